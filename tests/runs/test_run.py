"""`expunge run` end to end: what it writes, what it refuses to write, and what never leaks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import mostly_slow
from expunge.cli.main import main
from expunge.methods.catalog import METHODS

Cli = Callable[..., tuple[int, str, str]]
Run = Callable[..., tuple[int, str, str]]
Finished = tuple[Path, int, str]
QUICK = ("spectral", "adaptive-rmu", "npo")
FEW = ("--method.random-rows", 8)
"""Of 128, whose text takes longer to write than these runs."""


def options_of(row_files: dict[str, Path], output: Path, method: str) -> list[object]:
    """Two epochs; the defaults are for widths of 192 and more."""
    return [
        *(FEW if method in ("spectral", "libu") else ()),
        *("--forget", row_files["forget"], "--retain", row_files["retain"]),
        *("--output", output, "--epochs", 2, "--learning-rate", 1e-3, "--quiet"),
    ]


@pytest.fixture
def start(
    memorised_dir: Path,
    model_dir: Callable[..., Path],
    row_files: dict[str, Path],
    run_cli: Cli,
    tmp_path: Path,
) -> Run:
    """Runs a method for two epochs into tmp_path/out; later options override."""

    def call(*options: object) -> tuple[int, str, str]:
        method = str(options[options.index("--method") + 1]) if "--method" in options else "spectral"
        return run_cli(
            "run",
            memorised_dir,
            *options_of(row_files, tmp_path / "out", "" if "--config" in options else method),
            *(("--base", model_dir()) if "retrain" in options else ()),
            *options,
        )

    return call


@pytest.fixture(scope="module")
def run_of(
    memorised_dir: Path,
    model_dir: Callable[..., Path],
    row_files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Finished]:
    """A run of a method, made once and only read: where it is, its exit code and all that it said."""
    made: dict[str, Finished] = {}

    def call(method: str) -> Finished:
        if method not in made:
            output, said = tmp_path_factory.mktemp(method) / "out", io.StringIO()
            words = [memorised_dir, *("--method", method), *options_of(row_files, output, method)]
            words += ["--nonmembers", row_files["nonmembers"]]
            words += ["--base", model_dir()] if method == "retrain" else []
            with redirect_stdout(said), redirect_stderr(said):
                code = main(["run", *map(str, words)])
            made[method] = output, code, said.getvalue()
        return made[method]

    return call


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "expunge.json").read_text(encoding="utf-8"))


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.mark.parametrize("method", mostly_slow(METHODS, *QUICK))
def test_every_method_writes_a_model_that_loads(
    method: str,
    run_of: Callable[[str], Finished],
    memorised_dir: Path,
    model_dir: Callable[..., Path],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, code, said = run_of(method)
    assert (code, said) == (0, "")
    record = manifest(out)
    origin = model_dir() if method == "retrain" else memorised_dir
    before = load_file(origin / "model.safetensors")
    after = load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed == {change["name"] for change in record["changed_tensors"]}
    for change in record["changed_tensors"]:
        delta = (after[change["name"]].float() - before[change["name"]].float()).norm()
        assert change["change_norm"] == pytest.approx(float(delta), rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(dict(model.state_dict())[next(iter(changed))], after[next(iter(changed))])
    assert len(AutoTokenizer.from_pretrained(out)) > 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, record["steps"] + 1))
    assert all({"forget", "retain", "gradient_norm"} <= set(line) for line in steps)


def test_the_manifest_says_what_was_run(
    start: Run,
    tmp_path: Path,
    memorised_dir: Path,
    row_files: dict[str, Path],
    secret_file: Path,
) -> None:
    import hashlib
    import hmac

    assert start("--method", "adaptive-rmu", "--method.layer", 2, "--seed", 5)[0] == 0
    record = manifest(tmp_path / "out")
    assert record["status"] == "complete"
    ended = datetime.now(UTC) - datetime.fromisoformat(record["finished"])
    assert timedelta(0) <= ended < timedelta(minutes=5)
    assert record["settings"]["method"]["name"] == "adaptive-rmu"
    assert record["settings"]["method"]["layer"] == 2
    assert record["seed"] == 5
    text = (tmp_path / "out" / "expunge.json").read_text()
    assert record["settings"]["inputs"]["forget"] == "forget.jsonl"
    assert str(row_files["forget"].parent) not in text
    assert str(tmp_path) not in text
    assert str(memorised_dir.parent) not in text
    plain = hashlib.sha256(row_files["forget"].read_bytes()).hexdigest()
    assert plain not in text
    keyed = hmac.new(bytes.fromhex(secret_file.read_text()), b"source\0" + plain.encode(), "sha256")
    assert record["data_hmac_sha256"]["forget"].partition(":")[2] == keyed.hexdigest()
    weights = hashlib.sha256((memorised_dir / "model.safetensors").read_bytes()).hexdigest()
    assert record["model_sha256"]["model.safetensors"] == weights
    assert {"tokenizer.json", "config.json"} <= set(record["model_sha256"])
    assert record["peak_memory_bytes"]["process"] > 0
    assert record["environment"]["libraries"]["torch"]
    history = record["selection"]
    assert history["chosen_step"] in [candidate["step"] for candidate in history["candidates"]]
    assert load_file(tmp_path / "out" / "expunge-directions.safetensors").keys() == {
        f"direction.{number}" for number in range(3)
    }


def test_how_columns_were_read_is_in_the_manifest_and_a_report_reads_them_so(
    start: Run,
    run_cli: Cli,
    forget_rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "other.jsonl"
    rows = [{"q": row["input"], "a": row["output"], "nr": row["id"]} for row in forget_rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapped = "forget.prompt=q,forget.output=a,forget.id=nr"
    options = ("--forget", path, "--columns", mapped, "--max-steps", 2)
    assert start(*options) == (0, "", "")
    record = manifest(tmp_path / "out")
    assert record["settings"]["inputs"]["columns"] == mapped
    assert record["rows_read"]["forget"]["columns"] == {"q, a": 8}
    assert record["rows_read"]["retain"]["columns"] == {"input, output": 8}
    assert run_cli("report", tmp_path / "out", "--forget", path)[0] == 0


@pytest.mark.parametrize("method", mostly_slow(["spectral", "adaptive-rmu", "libu", "npo"], *QUICK))
def test_the_same_run_twice_gives_the_same_bytes(
    method: str,
    run_of: Callable[[str], Finished],
    start: Run,
    row_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    first = (run_of(method)[0] / "model.safetensors").read_bytes()
    options = ("--method", method, "--nonmembers", row_files["nonmembers"])
    assert start(*options)[0] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert start(*options, "--overwrite", "--seed", 1)[0] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != first


@pytest.mark.parametrize("method", mostly_slow(METHODS, *QUICK))
def test_no_forget_text_in_any_written_file(
    method: str, run_of: Callable[[str], Finished], forget_rows: list[dict[str, str]]
) -> None:
    directory, code, said = run_of(method)
    assert code == 0
    secrets = [row[column] for row in forget_rows for column in ("input", "output")]
    assert min(map(len, secrets)) >= 6
    searched = 0
    for path in files_below(directory.parent):
        if path.name in ("model.safetensors", "tokenizer.json"):
            continue
        content = path.read_bytes()
        searched += 1
        for secret in secrets:
            assert secret.encode() not in content, path.name
            assert json.dumps(secret).strip('"').encode() not in content, path.name
    assert searched >= 3
    assert not any(secret in said for secret in secrets)


def test_a_kept_adapter_gives_the_merged_model(start: Run, tmp_path: Path, memorised_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = ("--method", "libu", "--method.rank", 4, "--keep-adapter")
    assert start(*options) == (0, "", "")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        # W + BA applied at once or in two products: float32 rounding.
        torch.testing.assert_close(
            adapted(input_ids=ids).logits, merged.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_full_weights_can_be_trained(start: Run, tmp_path: Path) -> None:
    options = ("--method", "gradient-difference", "--method.parameters", "full")
    assert start(*options)[0] == 0
    names = {change["name"] for change in manifest(tmp_path / "out")["changed_tensors"]}
    assert "model.embed_tokens.weight" in names


@pytest.mark.parametrize(
    "method", mostly_slow(["spectral", "adaptive-rmu", "libu", "kl-minimization"], "adaptive-rmu")
)
def test_bfloat16_runs_with_float32_masters(method: str, start: Run, tmp_path: Path) -> None:
    assert start("--method", method, "--dtype", "bfloat16")[0] == 0
    assert manifest(tmp_path / "out")["settings"]["training"]["dtype"] == "bfloat16"


def test_without_retain_set_a_method_without_retain_term_runs_and_warns(
    memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    code, _, err = run_cli(
        "run", memorised_dir, "--forget", row_files["forget"], "--output", tmp_path / "out",
        "--method", "gradient-ascent", "--epochs", 1, "--learning-rate", 1e-3,
    )  # fmt: skip
    assert code == 0
    assert "no retain set" in err
    assert "--retain" in err


def test_a_preset_and_a_yaml_file_and_flags_in_that_order(start: Run, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("method: {name: adaptive-rmu, layer: 2, alpha: 3}\nmax-steps: 2\n")
    options = ("--config", config, "--preset", "semeval-7b", "--method.alpha", 4)
    assert start(*options) == (0, "", "")
    record = manifest(tmp_path / "out")
    method, training = record["settings"]["method"], record["settings"]["training"]
    assert method["direction_kind"] == "uniform"  # preset
    assert method["layer"] == 2  # YAML over preset
    assert method["alpha"] == 4  # flag over both
    assert training["batch_size"] == 12
    assert record["steps"] == 2
    assert "SemEval" in record["settings"]["preset_source"]


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_state(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expunge.methods.log_odds import LogOddsObjective

    original = LogOddsObjective.loss
    calls = 0

    def poisoned(self: Any, forget: Any, retain: Any) -> Any:
        nonlocal calls
        calls += 1
        terms = original(self, forget, retain)
        factor = float("nan") if calls == 4 else 1.0
        return type(terms)(terms.forget * factor, terms.retain)

    monkeypatch.setattr(LogOddsObjective, "loss", poisoned)
    assert start("--epochs", 9, "--validate-every", 1, "--method.random_rows", 0)[0] == 0
    record = manifest(tmp_path / "out")
    assert record["selection"]["stopped"] == "the loss was not finite at step 4"
    assert record["selection"]["chosen_step"] <= 3
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


DESTROY = ("--method", "gradient-ascent", "--learning-rate", 1, "--epochs", 20)


def test_a_destroyed_model_is_never_picked(start: Run, tmp_path: Path) -> None:
    code, _, err = start(*DESTROY)
    assert code == 1
    assert err.count("\n") == 1
    assert "no checkpoint can be kept" in err
    assert "--learning-rate" in err
    assert files_below(tmp_path) == []


def test_select_last_keeps_even_a_destroyed_model_and_says_so(start: Run, tmp_path: Path) -> None:
    assert start(*DESTROY, "--select", "last", "--validate-every", 1)[0] == 0
    record = manifest(tmp_path / "out")
    assert record["selection"]["candidates"][-1]["destroyed"]
    assert record["warnings"][0].startswith("the kept checkpoint is destroyed")
    assert record["selection"]["stopped"].startswith("diverged")


def test_a_run_that_changed_nothing_says_so(start: Run, tmp_path: Path) -> None:
    assert start("--learning-rate", 1e-9)[0] == 0
    (warning,) = manifest(tmp_path / "out")["warnings"]
    assert warning.startswith("the kept checkpoint is unchanged")
    assert "--learning-rate" in warning


def test_a_time_limit_stops_in_time_and_keeps_the_best(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr("expunge.training.loop.time.monotonic", tick)
    assert start("--epochs", 1000, "--validate-every", 1, "--time-limit", "60s")[0] == 0
    record = manifest(tmp_path / "out")
    assert record["selection"]["stopped"] == "time limit"
    assert 3 < record["steps"] < 60


def test_a_checkpoint_that_reloads_differently_fails_the_run(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expunge.models import writing
    from expunge.runs import run

    original = writing.write_checkpoint

    def lossy(files: Any, weights: Any, directory: Path) -> Any:
        return original(files, {name: 0.999 * w for name, w in weights.items()}, directory)

    monkeypatch.setattr(run, "write_checkpoint", lossy)
    code, _, err = start()
    assert code == 1
    assert "reloads with other values" in err
    assert not (tmp_path / "out").exists()  # what was trained stays, to go on from


def test_validation_rows_are_kept_out_of_training_unless_the_fraction_is_0(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expunge.methods.spectral import Spectral

    seen: list[int] = []
    original = Spectral.start

    def count(self: Any, context: Any) -> Any:
        seen.append(sum(example.listed for example in context.retain))
        assert len(context.forget) == 8
        return original(self, context)

    monkeypatch.setattr(Spectral, "start", count)
    for fraction in (0, 0.25):
        assert start("--overwrite", "--validation-fraction", fraction)[0] == 0
    assert seen == [8, 6]
