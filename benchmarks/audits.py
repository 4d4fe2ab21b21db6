"""Audits of every run of benchmarks/methods.py: what each attack gets back from each method.

    python benchmarks/audits.py runs/methods/builtin/seed0 --material BENCHMARK --output runs/audits \\
        --write docs/audits.md

RUNS holds run directories. MATERIAL is the benchmark that they were made of: target/ (or itself),
oracle/ where there is one, and its row files. What is in the output already is not audited again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine
from material import Material

from expunge.audits.catalog import ATTACKS
from expunge.models.files import MANIFEST
from expunge.reporting.tables import markdown
from methods import replaced

NOTE = """\
Target and oracle: share of the facts that each attack extracts, the mean over the audits. Methods:
recovered share; 0 is as if never trained on, 1 as before. `membership` is the AUC furthest from
chance. `trigger` is what a forget token in a retain prompt costs beyond the target. `depth` is 0 for
the target and 1 for the oracle. A dash: no material, or the attack has no power.
{rows}, budget {budget}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--material", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", default="quick", choices=["quick", "standard", "thorough"])
    parser.add_argument("--name", default=None, help="of the section; null: the material's")
    parser.add_argument("--write", type=Path, help="page whose section is replaced")
    arguments = parser.parse_args()
    material = Material(arguments.material.resolve())
    section = f"audits {arguments.name or material.directory.name}"
    if arguments.write is not None:
        replaced(arguments.write.read_text(encoding="utf-8"), section, "")  # refused now
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for manifest in sorted(arguments.runs.glob(f"*/{MANIFEST}")):
        run = manifest.parent
        audit = arguments.output / f"{run.name}.json"
        if not audit.is_file():
            audited(run, material, audit, arguments.budget)
        found[run.name] = json.loads(audit.read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"{arguments.runs}: holds no run")
    text = table(found) + "\n" + note(found)
    print(text)
    print(f"For docs/machines.md: {machine(found, arguments.output)}.")
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(replaced(page, section, text), encoding="utf-8")


def audited(run: Path, material: Material, audit: Path, budget: str) -> None:
    """One audit, and beside it the seconds that it took."""
    options = [
        *(
            "--original",
            str(material.target),
            "--budget",
            budget,
            "--output",
            str(audit),
            "--cache",
            str(audit.parent / "cache"),
            "--quiet",
        ),
        *material.rows,
        *material.options(nonmembers="nonmembers.jsonl", paraphrases="paraphrases.jsonl"),
    ]
    if (material.directory / "oracle").is_dir():
        options += ["--oracle", str(material.directory / "oracle")]
    started = time.monotonic()
    command = [sys.executable, "-m", "expunge", "audit", str(run), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not audit.is_file():
        raise SystemExit(f"{run}: {done.stderr.strip()}")
    seconds = {"seconds": time.monotonic() - started}
    audit.with_suffix(".seconds").write_text(json.dumps(seconds) + "\n", encoding="utf-8")
    print(f"{run.name}: {seconds['seconds']:.0f} s", file=sys.stderr, flush=True)


def recovered(attack: Mapping[str, Any] | None) -> float | None:
    """What an attack found in the unlearned model; None where it says nothing."""
    if attack is None or not attack["power"]["has_power"]:
        return None
    if attack["kind"] == "membership":
        return furthest(attack["models"]["unlearned"])
    if attack["kind"] == "fragility":
        return float(attack["beyond_target"]["value"])
    if attack["kind"] == "depth":
        return float(attack["depth"]["value"])
    return float(attack["recovered"]["value"])


def furthest(model: Mapping[str, Any]) -> float:
    """The AUC furthest from chance, of all scores."""
    areas = [float(variant["auc"]["value"]) for variant in model["variants"].values()]
    return max(areas, key=lambda area: abs(area - 0.5))


def given(attacks: Sequence[Mapping[str, Any] | None], model: str) -> float | None:
    """What the target or the oracle gives, the mean over the audits; None where none was asked."""
    values = []
    for attack in attacks:
        if attack is None or model not in attack["models"]:
            continue
        if attack["kind"] == "membership":
            values.append(furthest(attack["models"][model]))
        elif attack["kind"] == "fragility":
            values.append(float(attack["models"][model]["lost"]["value"]))
        elif attack["kind"] == "depth":
            values.append({"target": 0.0, "oracle": 1.0}[model])  # by definition
        else:
            values.append(float(attack["models"][model]["extracted"]["value"]))
    return sum(values) / len(values) if values else None


def table(audits: Mapping[str, Mapping[str, Any]]) -> str:
    """Methods by attacks, in Markdown."""
    requests = {name: audit["requests"][0] for name, audit in audits.items()}
    names = [n for n in ATTACKS if any(n in request["attacks"] for request in requests.values())]

    def cells(values: Sequence[float | None]) -> list[str]:
        return ["-" if value is None else f"{value:.2f}" for value in values]

    lines = []
    for model in ("target", "oracle"):
        of = [[request["attacks"].get(n) for request in requests.values()] for n in names]
        lines.append([model, *cells([given(attacks, model) for attacks in of]), ""])
    for name, request in requests.items():
        values = [recovered(request["attacks"].get(attack)) for attack in names]
        lines.append([name, *cells(values), request["verdict"]["verdict"]])
    return markdown(["model", *names, "verdict"], lines)


def note(audits: Mapping[str, Mapping[str, Any]]) -> str:
    """How to read the table."""
    first = next(iter(audits.values()))
    asked = first["requests"][0]
    rows = f"{asked['audited']['rows']} of {asked['forget']['rows']} forget rows"
    return NOTE.format(rows=rows, budget=first["settings"]["budget"]["name"])


def machine(audits: Mapping[str, Mapping[str, Any]], output: Path) -> str:
    """Where it was measured, and what each audit took."""
    import torch

    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    took = []
    for name in audits:
        seconds = json.loads((output / f"{name}.seconds").read_text(encoding="utf-8"))["seconds"]
        took.append(f"{name} {seconds:.0f}")
    return (
        f"{describe_machine(threads)}; seconds of the audits, target and oracle attacked in the"
        f" first one and read in the others: {', '.join(took)}"
    )


if __name__ == "__main__":
    main()
