"""Runs that nobody made: small files of the right form, for the cases that a real run rarely gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

FORGET = hashlib.sha256(b"forget").hexdigest()
TARGET = hashlib.sha256(b"target").hexdigest()


def measured(forget: float, retain: float | None, auc: float | None) -> dict[str, Any]:
    """One reading of the run itself."""
    return {
        "forget_accuracy": forget,
        "forget_loss": 2.0 - forget,
        "retain_accuracy": retain,
        "retain_loss": None if retain is None else 1.5 - retain,
        "mia_auc": auc,
        "never_seen_distance": None if auc is None else 2 * auc,
    }


def made_up(directory: Path, *, metrics: bool = True, steps: int = 12, **changes: Any) -> dict[str, Any]:
    """Writes a run directory; `changes` replace entries of the manifest. Returns the manifest."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 6}))
    (directory / "model.safetensors").write_bytes(b"weights of " + directory.name.encode())
    if metrics:
        lines: list[dict[str, Any]] = []
        for step in range(1, steps + 1):
            retain = None if step == 3 else 0.01 * step
            lines.append({"step": step, "loss": 1.0, "forget": 1000.0 / step, "retain": retain})
        lines.append({"step": steps, "validation": measured(0.1, 0.9, 0.6), "score": 0.8})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "metrics.jsonl").write_text(text)
    files = [path for path in directory.iterdir() if path.name != "expunge.json"]
    manifest: dict[str, Any] = {
        "status": "complete",
        "finished": "2026-11-21T15:40:07+00:00",
        "expunge": "0.1.0",
        "settings": {
            "inputs": {"model": "some/target", "forget": "f.jsonl", "retain": "r.jsonl"},
            "method": {"name": "adaptive-rmu", "layer": 4, "alpha": 40.0},
            "preset": None,
            "preset_source": None,
            "training": {
                "epochs": 3,
                "time_limit": None,
                "validation_rows": {"forget": 64, "retain": 32},
            },
        },
        "seed": 7,
        "rows": {"forget": 1250, "retain": 40},
        "data_hmac_sha256": {"forget": f"0123abcd:{FORGET}", "retain": f"0123abcd:{TARGET}"},
        "device": "cpu",
        "processes": 1,
        "environment": {"python": "3.11.7", "libraries": {"torch": "2.13"}, "git": None},
        "method_notes": {"layer": 4, "hidden_states": "segment"},
        "steps": steps,
        "selection": {
            "target": measured(1.0, 0.98, 1.0),
            "candidates": [
                {"step": 6, "measured": measured(0.5, 0.95, 0.8), "score": 0.6, "destroyed": False},
                {"step": 12, "measured": measured(0.1, 0.9, 0.6), "score": 0.8, "destroyed": False},
            ],
            "chosen_step": 12,
            "why": "highest score 0.8000 of 2 usable candidates",
            "stopped": "all steps done",
            "judgement": {"ending": "unlearned", "why": "forget rows are gone"},
        },
        "seconds": {"train": 92.7, "total": 3671.0},
        "peak_memory_bytes": {"process": 1771012096},
        "warnings": [],
        "model_sha256": {"model.safetensors": TARGET},
        "resumed_from_steps": [],
        "changed_tensors": [
            change("model.layers.2.mlp.down_proj.weight", 3.0, 0.3),
            change("model.layers.4.mlp.down_proj.weight", 4.0, 0.4),
            change("model.layers.4.mlp.up_proj.weight", 3.0, 0.3),
            change("model.embed_tokens.weight", 10.0, 0.1),
        ],
        "output_sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
        },
    }
    manifest |= changes
    (directory / "expunge.json").write_text(json.dumps(manifest))
    return manifest


def change(name: str, norm: float, by: float) -> dict[str, Any]:
    """One entry of the changed tensors."""
    return {
        "name": name,
        "dtype": "float32",
        "norm": norm,
        "change_norm": by,
        "rounding_norm": 0.0,
        "changed_share": 0.9,
    }


def scores(path: Path, model: str, forget: float, retain: float | None, **more: Any) -> Path:
    """Writes a scores.json with two tasks, one of them without questions."""
    sides = {"forget": forget, "retain": retain}
    cells: dict[str, Any] = {
        side: {}
        if value is None
        else {
            "Task1": {"regurgitation": value, "knowledge": value / 2},
            "Task2": {"regurgitation": value / 4, "knowledge": None},
        }
        for side, value in sides.items()
    }
    values = {
        "model": model,
        **cells,
        "task_aggregate": None if retain is None else 0.5,
        "mia_auc": None,
        "mia_score": None,
        "utility": None,
        "final_score": None,
        "details": {"rows": {"forget": 1250, "retain": 40 if retain is not None else 0}},
    }
    path.write_text(json.dumps(values | more))
    return path


def estimate(value: float | None, low: float | None = None, high: float | None = None) -> Any:
    """As audit.json writes it."""
    return {"value": value, "low": low, "high": high}


def audit(
    path: Path,
    manifest: Mapping[str, Any],
    *,
    oracle: bool = False,
    fact: str = "ada1",
    **more: Any,
) -> dict[str, Any]:
    """Writes an audit.json of a made-up run: one attack with power, one without, and membership."""
    models = ("target", "unlearned", *(("oracle",) if oracle else ()))
    outcome = {"score": 1.0, "extracted": True, "by": "input"}
    no = {"score": 0.0, "extracted": False, "by": None}

    def extraction(title: str, *, power: bool) -> dict[str, Any]:
        return {
            "title": title,
            "kind": "extraction",
            "reference": "arXiv 2407.06460",
            "power": {"has_power": power, "why": None if power else "it gets 0% of the facts"},
            "sentence": f"{title}: half of it.",
            "recovered": estimate(0.25, 0.05, 0.5) | {"against": "oracle" if oracle else "zero"}
            if power
            else None,
            "models": {
                name: {"extracted": estimate(0.5, 0.1, 0.9), "variants": {"input": {"rows": 2}}}
                for name in models
            },
            "rows": [
                {
                    "id": fact,
                    "document": "ada",
                    "outcomes": {n: no if n == "oracle" else outcome for n in models},
                },
                {
                    "id": "ben1",
                    "document": "ben",
                    "outcomes": {n: outcome if n == "target" else no for n in models},
                },
            ],
        }

    membership: dict[str, Any] = {
        "title": "Membership inference",
        "kind": "membership",
        "reference": "arXiv 2404.02936",
        "power": {"has_power": True, "why": None},
        "sentence": "Membership inference: by loss AUC 0.61.",
        "recovered": None,
        "blind": None,
        "models": {
            name: {
                "variants": {
                    "min-k%/x": {"auc": estimate(0.61, 0.5, 0.7), "tpr": estimate(0.02, None, None)}
                }
            }
            for name in models
        },
        "rows": [],
    }
    verdict = {
        "verdict": "partly forgotten",
        "sentence": "Quantisation: 25% comes back",
        "weakest": "quantize",
        "findings": [
            {
                "verdict": "partly forgotten",
                "attack": "quantize",
                "sentence": "Quantisation: 25% comes back",
            },
            {
                "verdict": "over-unlearned",
                "attack": "membership",
                "sentence": "Membership inference: its AUC is 0.30 below 0.5",
            },
        ],
    }
    values: dict[str, Any] = {
        "format": "expunge-audit/1",
        "expunge": "0.1.0",
        "versions": {},
        "verdict": verdict,
        "models": {
            name: {
                "path": name,
                "sha256": {
                    "unlearned": manifest["output_sha256"],
                    "target": manifest["model_sha256"],
                    "oracle": {"model.safetensors": FORGET},
                }[name],
                "dtype": "float32",
                "tuned_in": "float32",
            }
            for name in models
        },
        "settings": {"budget": {"name": "quick"}, "seed": 0},
        "rows": {},
        "requests": [
            {
                "forget": {
                    "source": "f.jsonl",
                    "hmac_sha256": manifest["data_hmac_sha256"]["forget"],
                    "rows": 1250,
                    "documents": 60,
                },
                "audited": {"rows": 2, "documents": 2, "retain_rows": 8, "nonmembers": 4},
                "verdict": verdict,
                "kept": estimate(0.9, 0.8, 1.0),
                "attacks": {
                    "direct": extraction("Direct questions", power=False),
                    "quantize": extraction("Quantisation", power=True),
                    "membership": membership,
                },
                "not_run": {"relearn": "--attacks leaves it out"},
            }
        ],
    }
    values |= more
    path.write_text(json.dumps(values))
    return values


def parsed(text: str) -> ET.Element:
    """The page as XML: it is well-formed, or this fails."""
    assert text.lstrip().startswith("<!DOCTYPE html>")
    return ET.fromstring(text.lstrip().removeprefix("<!DOCTYPE html>"))


def words(element: ET.Element) -> str:
    """All text of an element, its style sheet left out."""
    parts = [element.text or ""] if element.tag != "style" else []
    for child in element:
        parts += [words(child), child.tail or ""]
    return " ".join(" ".join(parts).split())
