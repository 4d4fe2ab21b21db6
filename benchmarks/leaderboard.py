"""A leaderboard from the files that runs on the built-in benchmark leave: its entries and its table.

    python benchmarks/leaderboard.py RUN... --benchmark DIRECTORY --write docs/leaderboard.md

RUN holds expunge.json, scores.json (`expunge evaluate RUN --output RUN/scores.json`) and, where there
was an audit, audit.json. DIRECTORY is from `expunge benchmark build`. The entries lie beside the page,
one JSON line each; an entry of the same settings, seed and target is replaced. Without RUN the table is
written anew from them.

What is checked: the run began from the benchmark's target and was given all of its rows; scores and
audit are of the model that the run wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.benchmark.build import RECORD
from expunge.data.fingerprints import secret_check, source_fingerprint, users_secret
from expunge.evaluation.score_files import SCORES, read_scores
from expunge.methods.catalog import METHODS
from expunge.models.files import MANIFEST
from expunge.reporting.material import AUDIT
from expunge.reporting.tables import markdown, number
from expunge.runs.manifest import settings_of
from expunge.training.options import TrainingOptions
from methods import replaced

SECTION = "leaderboard"
WEIGHTS = "model.safetensors"
LOOP = ("max_steps", "max_grad_norm", "time_limit", "select", "retain_sampling", "skip_gone")
"""Options of the loop whose default is no method's own."""
HEADER = (
    "benchmark", "method", "seed", "settings that differ", "final ↑", "task aggregate ↑", "forget ↓",
    "MIA AUC → 0.5", "utility ↑", "audit", "seconds", "settings hash", "rows hash", "code",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="directories of runs")
    parser.add_argument("--benchmark", type=Path, help="the directory that they ran on")
    parser.add_argument("--write", type=Path, required=True, help="the page with the table")
    arguments = parser.parse_args()
    if arguments.runs and arguments.benchmark is None:
        raise SystemExit("--benchmark: give the directory that the runs were made on")
    page = arguments.write.read_text(encoding="utf-8")
    file = arguments.write.with_suffix(".jsonl")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    entries = {key_of(entry): entry for entry in map(json.loads, lines)}
    for run in arguments.runs:
        entry = entry_of(run, arguments.benchmark)
        entries[key_of(entry)] = entry
    best_first = sorted(entries.values(), key=lambda e: (e["benchmark"], -(e["final"] or 0.0)))
    text = replaced(page, SECTION, table(best_first))
    file.write_text("".join(json.dumps(entry) + "\n" for entry in best_first), encoding="utf-8")
    arguments.write.write_text(text, encoding="utf-8")


def key_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an entry is of; another of the same replaces it."""
    return entry["settings_sha256"], entry["seed"], entry["target_sha256"]


def entry_of(run: Path, benchmark: Path) -> dict[str, Any]:
    """A run's line. Raises SystemExit for files that are missing or do not belong together."""
    record, manifest, scores = read(benchmark / RECORD), read(run / MANIFEST), read(run / SCORES)
    check(run, record, manifest, scores)
    card = read_scores(str(run))
    settings = settings_in(manifest)
    git = manifest["environment"]["git"]
    return {
        "benchmark": f"builtin, seed {record['settings']['seed']}",
        "rows_sha256": record["content_hash"],
        "target_sha256": manifest["model_sha256"][WEIGHTS],
        "method": settings["method"]["name"],
        "changed": changed(manifest, read(benchmark / "target" / "config.json")),
        "settings_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "seed": manifest["seed"],
        "final": card.final_score,
        "task_aggregate": card.task_aggregate,
        "forget": card.mean("forget"),
        "mia_auc": card.mia_auc,
        "utility": card.utility,
        "audit": verdict(run, manifest),
        "seconds": None if manifest["resumed_from_steps"] else manifest["seconds"]["total"],
        "expunge": manifest["expunge"],
        "code": None if git is None else git["commit"][:9] + "+" * git["changes"],
        "scores_sha256": hashlib.sha256((run / SCORES).read_bytes()).hexdigest(),
    }


def read(path: Path) -> dict[str, Any]:
    """A JSON file's content. Raises SystemExit that names it."""
    if not path.is_file():
        raise SystemExit(f"{path}: not found; see docs/leaderboard.md for how to make it")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def check(
    run: Path, record: Mapping[str, Any], manifest: Mapping[str, Any], scores: Mapping[str, Any]
) -> None:
    """Raises SystemExit where a run is of another target or rows, or the scores of another model."""
    files = record["files"]
    if manifest["model_sha256"].get(WEIGHTS) != files[f"target/{WEIGHTS}"]:
        raise SystemExit(f"{run}: did not begin from this benchmark's target; name its --benchmark")
    secret = users_secret()
    for name in ("forget", "retain"):
        mark = source_fingerprint(secret, {name: files[f"{name}.jsonl"]})
        if manifest["data_hmac_sha256"].get(name) != f"{secret_check(secret)[:8]}:{mark}":
            raise SystemExit(
                f"{run}: its {name} rows are not the benchmark's, or were hashed under another secret;"
                " run it here"
            )
    check_same(run / SCORES, scores["model_sha256"], manifest)


def check_same(file: Path, digests: Mapping[str, str], manifest: Mapping[str, Any]) -> None:
    """Raises SystemExit where a file is about another model than the run wrote."""
    if digests.get(WEIGHTS) != manifest["output_sha256"][WEIGHTS]:
        raise SystemExit(f"{file}: is not of the model that this run wrote; measure it again")


def verdict(run: Path, manifest: Mapping[str, Any]) -> str | None:
    """That of the run's audit; None without one."""
    if not (run / AUDIT).is_file():
        return None
    audit = read(run / AUDIT)
    check_same(run / AUDIT, audit["models"]["unlearned"]["sha256"], manifest)
    return audit["verdict"]["verdict"] or "no verdict"


def settings_in(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a run did: the method's settings, the loop's options but the seed, and what it went by."""
    training = manifest["settings"]["training"]
    names = {f.name for f in dataclasses.fields(TrainingOptions)} - {"seed"}
    options = {name: value for name, value in training.items() if name in names | {"dtype", "yardstick"}}
    return {"method": manifest["settings"]["method"], "training": options}


def changed(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the method's defaults on a model of this size, by option."""
    training, method = manifest["settings"]["training"], manifest["settings"]["method"]
    kind = METHODS[method["name"]]
    defaults = kind.defaults
    usual = {
        "epochs": defaults.epochs_of(training["steps_per_epoch"]),
        "batch_size": defaults.batch_size,
        "learning_rate": defaults.learning_rate_at(
            config["hidden_size"], config["num_hidden_layers"], training["steps_per_epoch"]
        ),
        "schedule": defaults.schedule,
        **{name: getattr(TrainingOptions(), name) for name in LOOP},
    }
    found = {name: training[name] for name, value in usual.items() if training[name] != value}
    own = settings_of(kind())
    found |= {f"method.{name}": value for name, value in method.items() if value != own[name]}
    return found


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries in Markdown; hashes by their first digits."""
    return markdown(HEADER, [cells(entry) for entry in entries])


def cells(entry: Mapping[str, Any]) -> list[str]:
    """An entry's row."""
    told = [
        f"`{name}` {value:.3g}" if isinstance(value, float) else f"`{name}` {value}"
        for name, value in entry["changed"].items()
    ]
    seconds = entry["seconds"]
    return [
        entry["benchmark"],
        entry["method"],
        str(entry["seed"]),
        ", ".join(told) or "-",
        *(number(entry[name]) for name in ("final", "task_aggregate", "forget", "mia_auc", "utility")),
        entry["audit"] or "-",
        "-" if seconds is None else f"{seconds:.0f}",
        entry["settings_sha256"][:8],
        entry["rows_sha256"][:8],
        entry["code"] or entry["expunge"],
    ]


if __name__ == "__main__":
    main()
