"""Tuning on equal terms, for methods.py: as many trials of each method, over ranges of one rule."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from material import Material, attempted, built

from expunge.methods.catalog import METHODS
from expunge.search.results import RESULT

RATE, EPOCHS, STRENGTH = 4.0, 2, 10.0
"""How far a range goes either side of the default: a quarter to four times the learning rate, half to
twice the epochs, a tenth to ten times each strength."""
STRENGTHS: Mapping[str, tuple[str, ...]] = {
    "spectral": ("retain_weight", "random_weight"),
    "libu": ("retain_weight", "random_weight"),
    "adaptive-rmu": ("beta", "alpha"),
    "libu-published": ("gamma", "retain_weight"),
    "rmu": ("coefficient", "alpha"),
    "gradient-difference": ("retain_weight",),
    "kl-minimization": ("retain_weight",),
    "npo": ("beta", "retain_weight"),
    "simnpo": ("beta", "retain_weight"),
    "token-npo": ("beta", "retain_weight"),
    "sam-npo": ("beta", "retain_weight"),
    "idk-dpo": ("beta", "retain_weight"),
    "alt-po": ("beta", "retain_weight"),
    "wga": ("alpha", "retain_weight"),
    "satimp": ("beta1", "retain_weight"),
    "undial": ("strength", "retain_weight"),
    "jensun": ("retain_weight",),
    "npo-merging": ("beta", "kl_weight"),
    "chunked-gradient-difference": ("retain_weight",),
}
"""What is varied beside learning rate and epochs: how hard a method pushes, and how hard it holds.

A method without an entry has neither, or weights that it moves itself."""


def check_unreported(arguments: argparse.Namespace) -> None:
    """Refuses to tune on rows that are reported."""
    on = arguments.tune_on
    if on == "builtin":
        reported = "builtin" in arguments.benchmarks and arguments.tune_seed in arguments.seeds
    else:
        reported = Path(on).resolve() in [Path(each).resolve() for each in arguments.benchmarks]
    if reported:
        raise SystemExit("--tune: its rows are reported; give another --tune-seed or --tune-on")


def tuned(method: str, arguments: argparse.Namespace) -> list[str] | str:
    """The settings that a method's sweep found, as options; or why it found none."""
    on, seed, trials = arguments.tune_on, arguments.tune_seed, arguments.tune
    name = on if on == "builtin" else Path(on).resolve().name
    output = arguments.output / f"tuning-{name}-seed{seed}-{trials}-{arguments.dtype}" / method
    if not has_ended(output, trials):
        output.parent.mkdir(parents=True, exist_ok=True)
        material = built(seed) if on == "builtin" else Material(Path(on))
        rows = [*material.sweep_options, "--dtype", arguments.dtype]
        command = sweep_command(method, trials, seed, material.target, rows, output)
        reason = attempted(command, output, f"{method}, tuning")
        if reason is not None:
            return reason
    best = best_options(output)
    return "no trial was usable" if best is None else ["--method", method, *best]


def search_words(method: str, target: Path) -> list[str]:
    """The search space, as the words of `--search`; the default rate is that of the target's size."""
    kind = METHODS[method]
    defaults = kind.defaults
    config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
    rate = defaults.learning_rate_at(
        config["hidden_size"],
        config["num_hidden_layers"],
        defaults.least_steps,  # no set of a benchmark is small
    )
    epochs = defaults.epochs
    words = [
        f"learning_rate=log:{rate / RATE:.4g}:{rate * RATE:.4g}",
        f"epochs=int:{max(1, epochs // EPOCHS)}:{epochs * EPOCHS}",
    ]
    for name in STRENGTHS.get(method, ()):
        value = getattr(kind(), name)
        words.append(f"method.{name}=log:{value / STRENGTH:.4g}:{value * STRENGTH:.4g}")
    return words


def sweep_command(
    method: str, trials: int, seed: int, target: Path, rows: Sequence[str], output: Path
) -> list[str]:
    """The sweep; `rows` are the options with what it unlearns and scores with."""
    # A sweep refuses an objective that it has no rows for.
    whole = {"--mmlu", "--calibration"} <= set(rows)
    chosen = ["--objectives", "final" if whole else "aggregate"]
    # All trials, however many fail.
    chosen += ["--trials", str(trials), "--max-failures", str(trials)]
    words = ["--search", *search_words(method, target)]
    options = ["--method", method, "--seed", str(seed), "--output", str(output), "--quiet"]
    return ["sweep", str(target), *rows, *options, *chosen, *words]


def best_options(sweep: Path) -> list[str] | None:
    """The best trial's settings as options of `expunge run`; None where no trial was usable."""
    result = json.loads((sweep / RESULT).read_text(encoding="utf-8"))
    found = [trial["params"] for trial in result["trials"] if trial["number"] == result["best"]]
    if not found:
        return None
    named = {f"--{name.replace('_', '-')}": value for name, value in found[0].items()}
    return [word for name, value in named.items() for word in (name, str(value))]


def has_ended(sweep: Path, trials: int) -> bool:
    """Whether a sweep has had all its trials."""
    file = sweep / RESULT
    if not file.is_file():
        return False
    ended: int = json.loads(file.read_text(encoding="utf-8"))["counts"]["ended"]
    return ended >= trials
