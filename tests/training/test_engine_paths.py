"""`expunge run` by every way through the model: the same weights, and the manifest says which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import mostly_slow, tiny_model
from exact_muon import PRODUCTS
from expunge.data.sampling import step_batches
from expunge.models.parts import StreamedModel
from expunge.models.tensors import stored_tensors
from expunge.segments.engine import SegmentEngine
from expunge.segments.packing import NotASegment

Run = Callable[..., Path]
SINGLE = "model.safetensors"
REASON = "it is asked to in this test"
# Each step rounds its sums otherwise, and Adam divides small gradients by small ones.
TOLERANCE = 1e-5


@pytest.fixture
def start(
    memorised_dir: Path,
    row_files: dict[str, Path],
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> Run:
    """Runs two epochs into a directory of its own, which it returns; later options override."""
    count = 0

    def call(*options: object, model: Path = memorised_dir) -> Path:
        nonlocal count
        count += 1
        chosen = options if "--method" in options else ("--method", "adaptive-rmu", *options)
        steers = chosen[chosen.index("--method") + 1] in ("adaptive-rmu", "rmu")
        exact = ("--method.optimizer", "adamw") if steers else ()  # see exact_muon
        output = tmp_path / f"out{count}"
        code, _, err = run_cli(
            "run",
            model,
            *("--forget", row_files["forget"], "--retain", row_files["retain"]),
            *("--output", output, "--epochs", 2, "--batch-size", 4, "--learning-rate", 1e-3),
            "--quiet",
            *exact,
            *chosen,
        )
        assert (code, err) == (0, ""), err
        return output

    return call


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "expunge.json").read_text(encoding="utf-8"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / SINGLE)


def difference(one: Path, other: Path, target: Path) -> float:
    """Largest over the tensors that changed: Frobenius norm in units of the tensor's own."""
    before, found, expected = weights(target), weights(one), weights(other)
    changed = {change["name"] for change in manifest(other)["changed_tensors"]}
    assert changed == {change["name"] for change in manifest(one)["changed_tensors"]}
    assert changed
    for name in changed:
        assert not torch.equal(expected[name], before[name])
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in changed)


def change(directory: Path, target: Path) -> float:
    """Smallest over the changed tensors, in the same units: what a difference is to be read against."""
    before, after = weights(target), weights(directory)
    names = [entry["name"] for entry in manifest(directory)["changed_tensors"]]
    return min(float((after[n] - before[n]).norm() / before[n].norm()) for n in names)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go through hooks."""

    def refuse(*_: object) -> None:
        raise NotASegment(REASON)

    monkeypatch.setattr("expunge.runs.opening.open_engine", refuse)
    monkeypatch.setattr("expunge.training.unlearning.open_engine", refuse)


def same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed runs shuffle rows freely; padded ones put rows of similar length together."""

    def batches(*arguments: Any, by_length: bool) -> Any:
        del by_length
        return step_batches(*arguments, by_length=False)

    monkeypatch.setattr("expunge.training.loop.step_batches", batches)


@pytest.mark.parametrize("method", mostly_slow(["adaptive-rmu", "rmu"], "adaptive-rmu"))
@pytest.mark.parametrize(("layer", "ways"), [(3, ("streamed", "whole")), (2, ("streamed",))])
def test_the_segment_gives_the_weights_that_hooks_on_the_whole_model_give(
    method: str,
    layer: int,
    ways: tuple[str, ...],
    start: Run,
    memorised_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same_order(monkeypatch)
    options = (
        *("--method", method, "--method.layer", layer),
        *("--select", "last", "--validate-every", 2),
    )
    with monkeypatch.context() as patch:
        forbid(patch)
        hooks = start(*options)
    assert manifest(hooks)["method_notes"]["hidden_states"] == "hooks"
    assert change(hooks, memorised_dir) > 100 * TOLERANCE
    for way in ways:
        if way == "whole":
            monkeypatch.setattr("expunge.runs.opening.why_not_streamed", lambda *_, **__: REASON)
        segment = start(*options)
        assert manifest(segment)["method_notes"]["hidden_states"] == "segment"
        assert difference(segment, hooks, memorised_dir) < TOLERANCE, way
        for one, other in zip(
            manifest(segment)["selection"]["candidates"],
            manifest(hooks)["selection"]["candidates"],
            strict=True,
        ):
            assert one["step"] == other["step"]
            assert one["measured"] == {
                name: value if value is None else pytest.approx(value, rel=1e-3, abs=1e-3)
                for name, value in other["measured"].items()
            }
        losses = [manifest(run)["selection"]["target"]["forget_loss"] for run in (segment, hooks)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_manifest_says_which_way_was_taken_and_why(
    start: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = manifest(start())
    assert plain["method_notes"]["hidden_states"] == "segment"
    assert plain["method_notes"]["cache"]["rows_recomputed"] == 0
    assert plain["method_notes"]["cache"]["rows"] > 8
    assert plain["method_notes"]["cache"]["dtype"] == "float32"
    assert not [warning for warning in plain["warnings"] if "whole model" in warning]
    forbid(monkeypatch)
    hooked = manifest(start())
    assert hooked["method_notes"]["hidden_states"] == "hooks"
    assert "cache" not in hooked["method_notes"]
    assert f"the whole model runs in every step: {REASON}" in hooked["warnings"]
    other = manifest(start("--method", "npo"))
    assert not [warning for warning in other["warnings"] if "whole model" in warning]


def save(model: Any, tokenizer: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom"])
def test_a_model_that_cannot_be_cut_is_unlearned_all_the_same(
    family: str, start: Run, tokenizer: Any, tmp_path: Path
) -> None:
    model = save(tiny_model(family, len(tokenizer)), tokenizer, tmp_path / "model")
    options = ("--method.layer", 3, "--unknown-rows", "unlearn", "--epochs", 1)
    out = start(*options, "--select", "last", model=model)
    record = manifest(out)
    assert record["method_notes"]["hidden_states"] == "hooks"
    (warning,) = [text for text in record["warnings"] if "whole model" in text]
    reason = {
        "gpt2": "its layers on their own differ from the whole model (states by ",
        "gemma2": "its attention has dropout, soft capping or a position bias",
        "bloom": "its layers do not run on their own (ValueError)",
    }[family]
    assert warning.startswith(f"the whole model runs in every step: {reason}")
    assert len(record["changed_tensors"]) == 3
    assert change(out, model) > 1e-4


@pytest.mark.slow
def test_the_size_of_the_cache_does_not_change_the_weights(start: Run, memorised_dir: Path) -> None:
    plain = start("--method.layer", 3)
    rows = manifest(plain)["method_notes"]["cache"]["rows"]
    for limit, kept in (("0", {0}), ("6kB", set(range(1, rows))), ("1TB", {rows})):
        limited = start("--method.layer", 3, "--cache-limit", limit)
        notes = manifest(limited)["method_notes"]["cache"]
        assert notes["rows"] in kept
        assert notes["rows"] + notes["rows_recomputed"] == rows
        assert difference(limited, plain, memorised_dir) < TOLERANCE
        assert (
            manifest(limited)["selection"]["chosen_step"]
            == (manifest(plain)["selection"]["chosen_step"])
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_narrow_cache_gives_nearly_the_same_weights(
    dtype: str, start: Run, memorised_dir: Path
) -> None:
    options = ("--method.layer", 3, "--dtype", dtype, "--select", "last")
    plain, narrow = start(*options), start(*options, "--cache-dtype", "bfloat16")
    notes = manifest(narrow)["method_notes"]["cache"]
    assert notes["dtype"] == "bfloat16"
    if dtype == "bfloat16":
        assert (narrow / SINGLE).read_bytes() == (plain / SINGLE).read_bytes()
        return
    assert 0 < notes["bytes"] < 0.6 * manifest(plain)["method_notes"]["cache"]["bytes"]
    found = difference(narrow, plain, memorised_dir)
    assert 0 < found < 0.3 * change(plain, memorised_dir)


@pytest.mark.parametrize(
    "method",
    mostly_slow(
        [
            "spectral",
            "adaptive-rmu",
            "npo",
            "simnpo",
            "kl-minimization",
            "gradient-difference",
            "libu",
            "libu-published",
            "token-npo",
            "idk-dpo",
            "alt-po",
            "wga",
            "satimp",
            "undial",
            "jensun",
            "npo-merging",
            "chunked-gradient-difference",
            "localized-gradient-difference",
            "rep-select",
        ],
        "spectral",
        "adaptive-rmu",
        "npo",
    ),
)
def test_micro_batches_do_not_change_the_weights(
    method: str, start: Run, memorised_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PRODUCTS, torch.float64)
    # Random rows of a micro-batch weigh as they do in the step.
    random = ("--method.random-weight", 0.25, "--method.random-rows", 8)
    own: tuple[object, ...] = random if method in ("spectral", "libu") else ()
    if method == "rep-select":
        own = ("--learning-rate", 100)
    options = ("--method", method, "--select", "last", "--max-steps", 3, *own)
    plain = start(*options)
    assert change(plain, memorised_dir) > 20 * TOLERANCE
    for size in (1, 3):
        small = start(*options, "--micro-batch-size", size)
        assert difference(small, plain, memorised_dir) < TOLERANCE, size
        for one, other in zip(metrics(small), metrics(plain), strict=True):
            for term in ("loss", "forget", "retain", "gradient_norm"):
                if other[term] is None:  # nothing is held
                    assert one[term] is None
                    continue
                assert one[term] == pytest.approx(other[term], rel=1e-4, abs=1e-6), (size, term)


def metrics(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_passes_of_few_tokens_do_not_change_the_weights(
    start: Run, memorised_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine does by itself where a step's tokens are more than a pass should hold."""
    plain = start("--select", "last")
    passes = 0
    original, now = SegmentEngine.__init__, SegmentEngine.now

    def narrow(self: SegmentEngine, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.pass_tokens = 60

    def count(self: SegmentEngine, *batches: Any) -> list[torch.Tensor]:
        nonlocal passes
        passes += 1
        return now(self, *batches)

    monkeypatch.setattr(SegmentEngine, "__init__", narrow)
    monkeypatch.setattr(SegmentEngine, "now", count)
    small = start("--select", "last")
    assert passes > manifest(small)["steps"]
    assert difference(small, plain, memorised_dir) < TOLERANCE


@pytest.mark.parametrize("options", [(), ("--method", "npo"), ("--dtype", "bfloat16")])
def test_only_the_changed_tensors_bytes_differ_from_the_targets(
    options: tuple[str, ...], start: Run, memorised_dir: Path
) -> None:
    out = start(*options)
    before = (memorised_dir / SINGLE).read_bytes()
    after = (out / SINGLE).read_bytes()
    assert len(before) == len(after)
    stored = stored_tensors(memorised_dir / SINGLE)
    names = {entry["name"] for entry in manifest(out)["changed_tensors"]}
    assert names < set(stored)
    for name in names:
        begin, end = stored[name].start, stored[name].start + stored[name].bytes
        assert before[begin:end] != after[begin:end]
        after = after[:begin] + before[begin:end] + after[end:]
    assert after == before


def test_layers_above_are_never_read_where_nothing_is_measured(
    start: Run, memorised_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = StreamedModel.load

    def note(self: StreamedModel, *modules: str) -> None:
        read.extend(modules)
        original(self, *modules)

    monkeypatch.setattr(StreamedModel, "load", note)
    # The written model is probed as a whole, so that is left out here.
    monkeypatch.setattr("expunge.runs.run.verify_checkpoint", lambda *_, **__: None)
    # A target that is asked whether it knows the rows is read as a whole, once.
    start("--method.layer", 2, "--select", "last", "--unknown-rows", "unlearn")
    assert {"model.layers.0", "model.layers.1", "model.layers.2"} <= set(read)
    assert not {"model.layers.3", "lm_head"} & set(read)
    start("--method.layer", 2)
    assert {"model.layers.3", "lm_head"} <= set(read)


def test_the_library_unlearns_a_model_in_memory_through_its_segment(
    memorised_dir: Path,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from expunge.methods.adaptive_rmu import AdaptiveRMU
    from expunge.training.options import TrainingOptions
    from expunge.training.unlearning import unlearn_model

    same_order(monkeypatch)
    found = []
    for hooks in (False, True):
        if hooks:
            forbid(monkeypatch)
        model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32)
        outcome = unlearn_model(
            model,
            AutoTokenizer.from_pretrained(memorised_dir),
            AdaptiveRMU(optimizer="adamw"),
            forget_rows,
            retain_rows,
            options=TrainingOptions(epochs=2, learning_rate=1e-3, select="last"),
        )
        assert outcome.notes["hidden_states"] == ("hooks" if hooks else "segment")
        for name, weight in outcome.finished.weights.items():
            assert torch.equal(model.get_parameter(name), weight)
        found.append(outcome.finished.weights)
    assert found[0].keys() == found[1].keys()
    for name, weight in found[1].items():
        assert float((found[0][name] - weight).norm() / weight.norm()) < TOLERANCE
