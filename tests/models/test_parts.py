"""Models whose parts come and go: the same parameters as from_pretrained, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import FAMILIES, random_examples, refusal, shaken, tiny_model
from expunge.data.batches import collate
from expunge.models import loading
from expunge.models.decoder import hidden_states, skeleton_of
from expunge.models.loading import CheckedModel, check_model, load_model
from expunge.models.parts import (
    StreamedModel,
    WholeModel,
    loaded_in_turn,
    outside_layers,
    why_not_streamed,
)

Save = Callable[..., CheckedModel]
# transformers loads GPT-NeoX's embed_out under another name, which check_model takes for missing.
DTYPES: tuple[Any, ...] = ("float32", "bfloat16")


@pytest.fixture
def save(tokenizer: Any, tmp_path: Path) -> Save:
    """Saves a model with weights that all matter."""

    def call(model: Any = None, **options: Any) -> CheckedModel:
        directory = tmp_path / "model"
        (model or shaken(tiny_model("olmo", len(tokenizer)))).save_pretrained(directory, **options)
        tokenizer.save_pretrained(directory)
        return check_model(str(directory))

    return call


def streamed(checked: CheckedModel, dtype: str = "float32") -> StreamedModel:
    return StreamedModel(checked, getattr(torch, dtype), "cpu")


def on_meta(model: nn.Module, prefix: str = "") -> set[bool]:
    module = model.get_submodule(prefix)
    return {parameter.is_meta for parameter in module.parameters()}


def layers_of(checked: CheckedModel) -> list[str]:
    return [f"{checked.layout.layers}.{index}" for index in range(checked.layout.count)]


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same_model(parts: StreamedModel, plain: Any) -> None:
    found = dict(parts.model.named_parameters(remove_duplicate=False))
    expected = dict(plain.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].dtype == parameter.dtype
        assert torch.equal(found[name], parameter), name
        assert not found[name].requires_grad
    buffers = dict(parts.model.named_buffers())
    assert buffers.keys() == dict(plain.named_buffers()).keys()
    for name, buffer in plain.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_from_pretrained_gives(
    family: str, dtype: Any, model_dir: Callable[[str], Path]
) -> None:
    checked = check_model(str(model_dir(family)))
    parts = streamed(checked, dtype)
    assert on_meta(parts.model) == {True}
    assert not parts.model.training
    parts.load("")
    assert on_meta(parts.model) == {False}
    plain = load_model(checked, dtype, "cpu")
    assert_same_model(parts, plain)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(parts.model(input_ids=ids).logits, plain(input_ids=ids).logits)
    parts.release("")
    assert on_meta(parts.model) == {True}


def test_the_files_of_another_dtype_are_cast_as_from_pretrained_does(save: Save, tokenizer: Any) -> None:
    checked = save(shaken(tiny_model("olmo", len(tokenizer))).to(torch.bfloat16))
    for dtype in DTYPES:
        parts = streamed(checked, dtype)
        parts.load("")
        assert_same_model(parts, load_model(checked, dtype, "cpu"))


def test_shards_are_read_one_part_at_a_time(save: Save) -> None:
    checked = save(max_shard_size="20KB")
    assert len(checked.files.shards) > 3
    parts = streamed(checked)
    parts.load("")
    assert_same_model(parts, load_model(checked, "float32", "cpu"))


def test_a_checkpoint_of_the_bare_decoder_is_read_by_its_own_names(save: Save, tokenizer: Any) -> None:
    checked = save(shaken(tiny_model("olmo", len(tokenizer))).model)
    assert all(not name.startswith("model.") for name in checked.files.tensors)
    parts = streamed(checked)
    parts.load("")
    assert_same_model(parts, load_model(checked, "float32", "cpu"))


@pytest.mark.parametrize("held", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_are_read_under_either_name(save: Save, held: str) -> None:
    checked = save()
    path = checked.files.directory / "model.safetensors"
    tensors = load_file(path)
    tensors[held] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    checked = check_model(str(checked.files.directory))
    parts = streamed(checked)
    for module in ("lm_head", "model.embed_tokens"):
        parts.load(module)
        assert torch.equal(parts.model.get_parameter(f"{module}.weight"), tensors[held])
        parts.release(module)


def test_an_own_head_under_a_tied_configuration_is_used_on_every_path(save: Save) -> None:
    """from_pretrained ties what the file holds alike, and nothing else."""
    checked = save()
    path = checked.files.directory / "model.safetensors"
    tensors = load_file(path)
    head = torch.flip(tensors["model.embed_tokens.weight"], [0])
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    checked = check_model(str(checked.files.directory))
    assert AutoConfig.from_pretrained(checked.files.directory).tie_word_embeddings
    parts = streamed(checked)
    parts.load("")
    assert torch.equal(parts.model.get_parameter("lm_head.weight"), head)
    assert_same_model(parts, load_model(checked, "float32", "cpu"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checked.files.directory)(ids).logits
        assert torch.equal(parts.model(ids).logits, expected)


def test_only_what_is_asked_for_is_loaded_and_released(save: Save) -> None:
    checked = save()
    parts = streamed(checked)
    zero, one, two, three = layers_of(checked)
    parts.load(one, two)
    loaded = {n for n, p in parts.model.named_parameters() if not p.is_meta}
    assert loaded
    assert loaded == {
        n for n, _ in parts.model.named_parameters() if n.startswith((f"{one}.", f"{two}."))
    }
    kept = parts.model.get_parameter(f"{one}.mlp.down_proj.weight")
    original = kept.clone()
    kept.data += 1
    parts.load(one, three)  # what is there stays, as it is
    assert parts.model.get_parameter(f"{one}.mlp.down_proj.weight") is kept
    parts.release(one)
    assert on_meta(parts.model, one) == {True}
    assert on_meta(parts.model, two) == on_meta(parts.model, three) == {False}
    assert on_meta(parts.model, zero) == {True}
    parts.load(one)
    again = parts.model.get_parameter(f"{one}.mlp.down_proj.weight")
    assert torch.equal(again, original)  # the file's, whatever was done to what is gone


def test_a_whole_model_stays_whole() -> None:
    model = tiny_model("olmo", 300)
    parts = WholeModel(model)
    before = dict(model.named_parameters())
    parts.load("model.layers.0")
    parts.release("model.layers.0")
    assert not parts.streamed
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert parts.device == torch.device("cpu")


def test_a_tensor_of_another_shape_is_refused_as_when_the_whole_model_is_loaded(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding with more rows than the configuration says would run, and be wrong."""
    checked = save()
    path = checked.files.directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.ones(8, 16)])
    save_file(tensors, path, metadata={"format": "pt"})
    assert "wants model.embed_tokens.weight of the shape" in refusal(
        lambda: check_model(str(checked.files.directory))
    )
    # Where the check cannot tell, as tensors are cut or joined when they are loaded, reading does.
    monkeypatch.setattr(loading, "_check_shapes", lambda *_: None)
    unchecked = check_model(str(checked.files.directory))
    assert refusal(lambda: load_model(unchecked, "float32", "cpu"))
    message = refusal(lambda: streamed(unchecked))
    assert message.startswith(f"{path}: tensor {name} has the shape ")
    assert str(tuple(tensors[name].shape)) in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_read_part_by_part_gives_the_models_output(
    family: str, save: Save, tokenizer: Any
) -> None:
    checked = save(shaken(tiny_model(family, len(tokenizer))))
    parts = streamed(checked)
    layers = layers_of(checked)
    modules = [*outside_layers(parts.model, layers), *layers]
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, sum(on_meta(parts.model, layer) == {False} for layer in layers))

    inside = [
        parts.model.get_submodule(f"{layer}.{checked.layout.mlp_output}").register_forward_hook(count)
        for layer in layers
    ]
    batch = collate(random_examples([9, 4, 7], len(tokenizer)), [0, 1, 2], 1)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    before = hooks_on(parts.model)
    with torch.no_grad(), loaded_in_turn(parts, modules):
        found = parts.model(**given, use_cache=False).logits
        assert on_meta(parts.model) == {True}
    assert most == 1
    assert hooks_on(parts.model) == before
    for handle in inside:
        handle.remove()
    with torch.no_grad():
        expected = load_model(checked, "float32", "cpu")(**given).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("where", ["mlp.act_fn", "self_attn.o_proj", ""])
def test_an_error_on_the_way_leaves_nothing_loaded_and_no_hook(save: Save, where: str) -> None:
    checked = save()
    parts = streamed(checked)
    layers = layers_of(checked)
    modules = [*outside_layers(parts.model, layers), *layers]

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    def attempt() -> None:
        broken = parts.model.get_submodule(f"{layers[2]}.{where}".rstrip("."))
        with loaded_in_turn(parts, modules), torch.no_grad():
            handle = broken.register_forward_pre_hook(fail)
            try:
                parts.model(input_ids=torch.arange(5)[None])
            finally:
                handle.remove()

    with pytest.raises(ZeroDivisionError):
        attempt()
    assert on_meta(parts.model) == {True}
    assert hooks_on(parts.model) == 0


def test_a_pass_that_stops_early_reads_no_layer_above(save: Save) -> None:
    checked = save()
    parts = streamed(checked)
    layers = layers_of(checked)
    read: list[str] = []
    load = parts.load

    def noted(*modules: str) -> None:
        read.extend(modules)
        load(*modules)

    parts.load = noted  # type: ignore[method-assign]
    batch = collate(random_examples([9, 4], 300), [0, 1], 1)
    with torch.no_grad(), loaded_in_turn(parts, ["model.embed_tokens", *layers]):
        states = hidden_states(parts.model, checked.layout, 1, batch)
    assert read == ["model.embed_tokens", *layers[:2]]
    assert on_meta(parts.model) == {True}
    plain = load_model(checked, "float32", "cpu")
    with torch.no_grad():
        assert torch.equal(states, hidden_states(plain, checked.layout, 1, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_what_is_outside_them_are_all_of_the_model(family: str) -> None:
    model = tiny_model(family, 300)
    prefix = "gpt_neox" if family == "gpt_neox" else "model"
    layers = [f"{prefix}.layers.{index}" for index in range(4)]
    outside = outside_layers(model, layers)
    assert not [name for name in outside if name.startswith(f"{prefix}.layers")]
    covered = [
        id(parameter)
        for name in (*outside, *layers)
        for parameter in model.get_submodule(name).parameters()
    ]
    assert set(covered) == {id(parameter) for parameter in model.parameters()}


def test_layer_1_is_not_taken_for_layer_10() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(11)])
    assert outside_layers(model, ["layers.1"]) == [
        f"layers.{index}" for index in range(11) if index != 1
    ]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_plain_families_can_be_streamed(family: str) -> None:
    skeleton = skeleton_of(tiny_model(family, 300).config)
    assert why_not_streamed(skeleton, own_code=False) is None


def test_what_reading_weights_alone_would_get_wrong_is_told() -> None:
    skeleton = skeleton_of(tiny_model("olmo", 300).config)
    told = why_not_streamed(skeleton, own_code=True)
    assert told == "its own code may do more than reading its weights"
    skeleton.model.norm.register_buffer("rotary", torch.zeros(2), persistent=False)
    assert why_not_streamed(skeleton, own_code=False) is None
    skeleton.model.norm.register_buffer("scale", torch.zeros(2))
    assert why_not_streamed(skeleton, own_code=False) == "its files hold buffers"


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_a_model_that_keeps_modules_in_float32_is_loaded_as_a_whole(attribute: str) -> None:
    skeleton = skeleton_of(tiny_model("olmo", 300).config)
    setattr(skeleton, attribute, [])
    assert why_not_streamed(skeleton, own_code=False) is None
    setattr(skeleton, attribute, ["norm"])
    assert why_not_streamed(skeleton, own_code=False) == "it keeps some modules in float32"
