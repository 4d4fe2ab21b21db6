"""Every method with its default settings, on benchmarks and seeds: a table and a figure of each.

    python benchmarks/methods.py builtin ../shared/models/lume-mini --output runs/methods
    python benchmarks/methods.py builtin --methods libu npo --seeds 0 --output runs/methods \\
        --write docs/benchmark.md
    python benchmarks/methods.py builtin --tune 20 --output runs/methods

`builtin` is built anew for every seed, rows and models. DIRECTORY holds a model (in `target/` or itself)
with forget.jsonl, retain.jsonl and, where they exist, calibration.jsonl, nonmembers.jsonl, mmlu/ and
oracle/; its seeds are those of the runs alone. Runs are calibrated against calibration.jsonl, which
scoring does not use, or else against nonmembers.jsonl.

Nothing is tuned without `--tune N`. With it every method, ours too, has N trials of `expunge sweep` on
rows that are not reported: those of `--tune-seed`, or of `--tune-on DIRECTORY`. Its best settings then
run beside its defaults (tuning.py has the search space).

Each run is a process of its own, so that its peak memory is its own. What is in the output already is
not run again; an interrupted run goes on. A method that failed is a row that says why; delete
METHOD.failed.json to try again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figure import Point, write_figure
from machine import describe_machine
from material import Material, attempted, built, scored
from tuning import check_unreported, tuned

from expunge.evaluation.score_files import SCORES
from expunge.evaluation.scorecard import Scorecard
from expunge.methods.catalog import METHODS
from expunge.models.files import MANIFEST
from expunge.reporting.tables import markdown

SECTION = "methods"
MEASURES = {
    "forget regurgitation": "forget regurgitation ↓",
    "forget knowledge": "forget knowledge ↓",
    "retain regurgitation": "retain regurgitation ↑",
    "retain knowledge": "retain knowledge ↑",
    "task aggregate": "task aggregate ↑",
    "MIA AUC": "MIA AUC → 0.5",
    "utility": "utility ↑",
    "final": "final ↑",
    "distance": "distance to the oracle ↓",
    "seconds": "seconds",
    "memory": "peak GiB",
}
TUNED = " (tuned)"
COMPARED = ("final", "task aggregate", "utility", "seconds")
"""What stands untuned and tuned side by side."""
NOTE = """\
Mean ± standard deviation over the seeds {seeds}; default settings if not tuned. Regurgitation and
knowledge are means over the tasks. Distance to the oracle: mean absolute difference over every part
of the scorecard that both have, seed by seed. The parts are regurgitation and knowledge of each task
and side, MIA AUC and utility. Memory is the peak of the run's process. Runs in {dtypes}, scores in
float32.
"""


@dataclass
class Row:
    """A model's values by measure, one for each seed that worked, and why the others did not."""

    values: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, values: Mapping[str, float | None]) -> None:
        """One seed's values; what was not measured is left out."""
        for name, value in values.items():
            if value is not None:
                self.values.setdefault(name, []).append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("benchmarks", nargs="+", help="builtin, or a directory with a model and rows")
    parser.add_argument("--output", type=Path, required=True)
    unlearning = [name for name in METHODS if name != "retrain"]  # no benchmark has a base
    parser.add_argument("--methods", nargs="+", default=unlearning, choices=unlearning)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tune", type=int, default=0, metavar="N", help="trials of every method")
    parser.add_argument("--tune-seed", type=int, default=100, help="of the sweeps and their rows")
    parser.add_argument("--tune-on", default="builtin", help="builtin, or a directory as above")
    parser.add_argument("--write", type=Path, help="page whose section between the markers is replaced")
    arguments = parser.parse_args()
    if arguments.write is not None:
        # Refused now, not after hours.
        replaced(arguments.write.read_text(encoding="utf-8"), SECTION, "")
    if arguments.tune:
        check_unreported(arguments)
    runs = settings_of_runs(arguments)

    sections = []
    for benchmark in arguments.benchmarks:
        name = "builtin" if benchmark == "builtin" else Path(benchmark).resolve().name
        place = arguments.output / name
        place.mkdir(parents=True, exist_ok=True)
        rows = measured(benchmark, runs, arguments.seeds, place, arguments.dtype)
        told, where = note(arguments.seeds, place)
        text = table(rows) + "\n" + told
        if arguments.tune:
            text += f"\n{side_by_side(rows)}\nTuned: the best of {arguments.tune} trials of each"
            text += " method, on rows that are not reported here.\n"
        write_figure(points(rows), f"{name}: what was forgotten and what was kept", place)
        values = {model: {**row.values, "failures": row.failures} for model, row in rows.items()}
        (place / "results.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (place / "table.md").write_text(text, encoding="utf-8")
        print(f"## {name}\n\n{text}\nFor docs/machines.md: {where}.", flush=True)
        picture = f"methods-{name}.svg"
        sections.append(f"### {name}\n\n![forgetting and retention]({picture})\n\n{text}")
        if arguments.write is not None:
            drawn = (place / "figure.svg").read_text(encoding="utf-8")
            (arguments.write.parent / picture).write_text(drawn, encoding="utf-8")
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(replaced(page, SECTION, "\n".join(sections)), encoding="utf-8")


def settings_of_runs(arguments: argparse.Namespace) -> dict[str, list[str] | str]:
    """By the name of a row its run's options, or why its tuning gave none."""
    runs: dict[str, list[str] | str] = {}
    for method in arguments.methods:
        runs[method] = ["--method", method]
        if arguments.tune:
            runs[method + TUNED] = tuned(method, arguments)
    return runs


def measured(
    benchmark: str,
    runs: Mapping[str, list[str] | str],
    seeds: Sequence[int],
    place: Path,
    dtype: str,
) -> dict[str, Row]:
    """Carries out what is missing, and returns every model's values."""
    rows = {name: Row() for name in ("target", "oracle", *runs)}
    settings = {name: given for name, given in runs.items() if not isinstance(given, str)}
    for name in runs.keys() - settings.keys():
        rows[name].failures.append(f"its tuning: {runs[name]}")
    for seed in seeds:
        material = built(seed) if benchmark == "builtin" else Material(Path(benchmark))
        here = place / f"seed{seed}" if benchmark == "builtin" else place
        here.mkdir(exist_ok=True)
        oracle = None
        # A directory's own models are the same for all seeds.
        if benchmark == "builtin" or seed == seeds[0]:
            rows["target"].add(parts_of(scored(material.target, material, here / "target.json")))
        if (material.directory / "oracle").is_dir():
            oracle = scored(material.directory / "oracle", material, here / "oracle.json")
            if benchmark == "builtin" or seed == seeds[0]:
                rows["oracle"].add(parts_of(oracle))
        for name, options in settings.items():
            output = place / f"seed{seed}" / directory_of(name, options)
            output.parent.mkdir(exist_ok=True)
            reason = unlearned([*options, "--dtype", dtype], seed, material, output)
            if reason is not None:
                rows[name].failures.append(f"seed {seed}: {reason}")
                continue
            card = scored(output, material, output / SCORES)
            values = {**parts_of(card), **costs_of(output)}
            rows[name].add({**values, "distance": distance(card, oracle)})
            print(f"{name}, seed {seed}: {numbers(values)}", file=sys.stderr, flush=True)
    return {name: row for name, row in rows.items() if row.values or row.failures}


def directory_of(name: str, options: Sequence[str]) -> str:
    """Where a row's runs go; other tuned settings are other runs."""
    if not name.endswith(TUNED):
        return name
    digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()
    return f"{name.removesuffix(TUNED)}-tuned-{digest[:8]}"


def unlearned(options: Sequence[str], seed: int, material: Material, output: Path) -> str | None:
    """Runs a method unless it was; why it failed, or None."""
    if (output / MANIFEST).is_file():
        return None
    command = ["run", str(material.target), *material.run_options, *options, "--seed", str(seed)]
    command += ["--output", str(output), "--resume", "--quiet"]
    return attempted(command, output, f"{output.name}, seed {seed}")


def parts_of(card: Scorecard) -> dict[str, float | None]:
    """The means over tasks and the totals, by measure."""
    values: dict[str, float | None] = {
        "task aggregate": card.task_aggregate,
        "MIA AUC": card.mia_auc,
        "utility": card.utility,
        "final": card.final_score,
        "forget": card.mean("forget"),
        "retain": card.mean("retain"),
    }
    cells = cells_of(card)
    for side in ("forget", "retain"):
        for kind in ("regurgitation", "knowledge"):
            found = [v for (s, _, k), v in cells.items() if (s, k) == (side, kind)]
            values[f"{side} {kind}"] = statistics.fmean(found) if found else None
    return values | {" ".join(key): value for key, value in cells.items()}


def cells_of(card: Scorecard) -> dict[tuple[str, str, str], float]:
    """Every measured cell by side, task and kind."""
    return {
        (side, task, kind): value
        for side, tasks in (("forget", card.forget), ("retain", card.retain))
        for task, cell in tasks.items()
        for kind, value in cell.items()
        if value is not None
    }


def distance(card: Scorecard, oracle: Scorecard | None) -> float | None:
    """Mean absolute difference over all cells, the MIA AUC and the utility that both have."""
    if oracle is None:
        return None
    mine, wanted = cells_of(card), cells_of(oracle)
    differences = [abs(mine[key] - wanted[key]) for key in mine.keys() & wanted.keys()]
    for one, other in ((card.mia_auc, oracle.mia_auc), (card.utility, oracle.utility)):
        if one is not None and other is not None:
            differences.append(abs(one - other))
    return statistics.fmean(differences) if differences else None


def costs_of(output: Path) -> dict[str, float | None]:
    """Seconds of the whole run, null for one that was interrupted, and its peak memory in GiB."""
    manifest: dict[str, Any] = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    whole = not manifest["resumed_from_steps"]
    return {
        "seconds": manifest["seconds"]["total"] if whole else None,
        "memory": manifest["peak_memory_bytes"]["process"] / 2**30,
    }


def numbers(values: Mapping[str, float | None]) -> str:
    """One line of the values that the table has."""
    return ", ".join(f"{k} {v:.3g}" for k, v in values.items() if k in MEASURES and v is not None)


def cell(name: str, values: Sequence[float]) -> str:
    """Mean and spread; a dash for what was not measured."""
    if not values:
        return "-"
    digits = {"seconds": 0, "memory": 2}.get(name, 3)
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table(rows: Mapping[str, Row]) -> str:
    """The table in Markdown; below it why runs failed."""
    lines = []
    for name, row in rows.items():
        done = len(row.values.get("forget", []))
        label = name if not row.failures else f"{name} ({done} of {done + len(row.failures)} seeds)"
        lines.append([label, *(cell(measure, row.values.get(measure, [])) for measure in MEASURES)])
    failures = [f"- {name}, {reason}" for name, row in rows.items() for reason in row.failures]
    told = "\nFailed:\n\n" + "\n".join(failures) + "\n" if failures else ""
    return markdown(["model", *MEASURES.values()], lines) + told


def side_by_side(rows: Mapping[str, Row]) -> str:
    """Untuned and tuned figures of every method in turn, in Markdown."""
    pairs = {name: (rows[name], rows[name + TUNED]) for name in rows if name + TUNED in rows}
    header = [f"{MEASURES[part]}, {kind}" for part in COMPARED for kind in ("untuned", "tuned")]
    lines = [
        [name, *(cell(part, row.values.get(part, [])) for part in COMPARED for row in pair)]
        for name, pair in pairs.items()
    ]
    return markdown(["method", *header], lines)


def note(seeds: Sequence[int], place: Path) -> tuple[str, str]:
    """How to read the table, and where it was measured."""
    import torch

    commits, dtypes = set(), set()
    for path in place.glob(f"seed*/*/{MANIFEST}"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        dtypes.add(manifest["settings"]["inputs"]["dtype"])
        git = manifest["environment"]["git"]
        commits.add("of a package" if git is None else git["commit"][:9] + "+" * git["changes"])
    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    told = NOTE.format(
        seeds=", ".join(map(str, seeds)),
        dtypes=" and ".join(sorted(dtypes)) or "an unknown dtype",
    )
    return told, f"{describe_machine(threads)}; commit {', '.join(sorted(commits)) or 'unknown'}"


def replaced(page: str, name: str, section: str) -> str:
    """The page with another section between the markers of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise SystemExit(f"--write: the page needs one line {begin} and below it one line {end}")
    pattern = re.escape(begin) + ".*" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n\n{section}\n{end}", page, flags=re.DOTALL)


def points(rows: Mapping[str, Row]) -> list[Point]:
    """Every model that was measured, on the two sides of its scorecard."""
    found = []
    for name, row in rows.items():
        kept, left = row.values.get("retain", []), row.values.get("forget", [])
        if kept and left:
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in (kept, left)]
            found.append(Point(name, statistics.fmean(kept), 1 - statistics.fmean(left), *spread))
    return found


if __name__ == "__main__":
    main()
