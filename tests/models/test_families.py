"""Every row of docs/models.md: a tiny random model goes through run, reload and evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import expunge
from conftest import NAMES, make_rows, refusal, write_jsonl
from expunge.evaluation.decoding import cache_serves
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.base import Method
from expunge.methods.libu import LIBU
from expunge.methods.spectral import Spectral
from expunge.models.decoder import find_layout, skeleton_of
from expunge.models.loading import check_model
from expunge.runs.run import RunInputs, run
from expunge.training.options import TrainingOptions
from families import EXPERTS, LAYERS, PAGE, REFUSED, SUPPORTED, configuration, page

# Every kind of place that layers, maps and positions can be in.
QUICK = {"bloom", "falcon", "gpt2", "gpt_bigcode", "lfm2", "mpt", "opt"}
METHODS: dict[str, Method] = {
    "spectral": Spectral(random_rows=4),
    "libu": LIBU(random_rows=4),
    "adaptive-rmu": AdaptiveRMU(random_rows=4),
}
FORGET, RETAIN = make_rows(NAMES[:1]), make_rows(NAMES[4:5], offset=3)
Unlearn = Callable[[str, str], Path]


def each(families: Any, quick: set[str] = QUICK) -> list[Any]:
    """The families that this version of Transformers knows; all but a few are slow together."""
    return [
        pytest.param(family, marks=() if family in quick else pytest.mark.slow)
        for family in families
        if family in CONFIG_MAPPING_NAMES
    ]


@pytest.fixture(scope="module")
def target_of(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A fresh model of a family, which its tests share and only read."""
    made: dict[str, Path] = {}

    def call(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("target")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = configuration(family, len(tokenizer))
                AutoModelForCausalLM.from_config(config).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return call


@pytest.fixture
def unlearn(target_of: Callable[[str], Path], tmp_path: Path) -> Unlearn:
    """Two steps of a method on a fresh model of a family; the run directory."""

    def unlearned(family: str, method: str) -> Path:
        output = tmp_path / method
        forget, retain = (
            str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
            for name, rows in (("forget", FORGET), ("retain", RETAIN))
        )
        inputs = RunInputs(str(target_of(family)), forget, str(output), retain, device="cpu")
        # A fresh model knows no row.
        options = TrainingOptions(max_steps=2, batch_size=2, unknown_rows="unlearn")
        run(inputs, METHODS[method], options)
        return output

    return unlearned


@pytest.mark.parametrize("family", each(SUPPORTED))
def test_a_family_is_unlearned_reloaded_and_measured(
    family: str,
    unlearn: Unlearn,
    target_of: Callable[[str], Path],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("expunge.evaluation.generation.MAX_NEW_TOKENS", 12)
    output = unlearn(family, "spectral")
    model = AutoModelForCausalLM.from_pretrained(output)
    before = AutoModelForCausalLM.from_pretrained(target_of(family)).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    layout = find_layout(model)
    assert changed <= {f"{name}.weight" for name in layout.linears()}
    for layer in range(LAYERS):
        # Gemma 3n's per-layer embeddings lead to weights that are 0 in a fresh model.
        maps = {f"{name}.weight" for name in layout.linears(layers=[layer])}
        assert len(maps & changed) > len(maps) / 2
    cards = [expunge.evaluate(model, tokenizer, FORGET, RETAIN, batch_size=size) for size in (1, 4)]
    assert cards[0] == cards[1]
    assert cache_serves(model) == SUPPORTED[family].cached


@pytest.mark.slow
@pytest.mark.parametrize("method", ["libu", "adaptive-rmu"])
@pytest.mark.parametrize("family", each(SUPPORTED))
def test_the_other_methods_work_on_a_family(family: str, method: str, unlearn: Unlearn) -> None:
    works = SUPPORTED[family].steered if method == "adaptive-rmu" else SUPPORTED[family].adapted
    if not works:
        message = refusal(lambda: unlearn(family, method))
        assert "--method spectral" in message
    else:
        assert (unlearn(family, method) / "expunge.json").is_file()


@pytest.mark.parametrize("family", each(REFUSED, set(REFUSED)))
def test_a_family_is_refused_by_name(family: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    reason = REFUSED[family][1]
    config = configuration(family, 300) if reason == EXPERTS else CONFIG_MAPPING[family]()
    message = refusal(lambda: find_layout(skeleton_of(config)))
    assert message.startswith(f"{family}: {reason}")
    assert message.endswith("docs/models.md")


def test_the_page_is_up_to_date() -> None:
    assert len(SUPPORTED) >= 45
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/models/families.py"


def test_a_family_whose_tensors_are_cut_as_they_are_saved_is_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    family = "olmo_hybrid"
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip("not in this version of Transformers")
    config = configuration(family, len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    message = refusal(lambda: check_model(str(tmp_path)))
    assert "transformers makes them of others" in message
    assert message.endswith("docs/models.md")
