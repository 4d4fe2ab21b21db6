"""What a reviewer wants behind the first page: scorecard, training, layers, weights, record."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from expunge.errors import InputError
from expunge.evaluation.outcomes import Measured
from expunge.evaluation.scorecard import KIND_NAMES
from expunge.reporting.figures import thinned
from expunge.reporting.material import Card, Material, plain

TOTALS = (
    ("task_aggregate", "task aggregate", "high"),
    ("mia_auc", "MIA AUC", "0.5"),
    ("mia_score", "MIA score", "high"),
    ("utility", "utility (guessing: 0.25)", "high"),
    ("final_score", "final score", "high"),
)
_GOOD = {"forget": "low", "retain": "high"}
_SHARES = ("score", "decodable", "restored", "separate", "written")


def scorecard(material: Material) -> dict[str, Any] | None:
    """Every part of every card, by task; None where there is no card."""
    cards = material.cards
    if not cards:
        return None
    rows = []
    for split in ("forget", "retain"):
        tasks = sorted({task for each in cards for task in _cells(each, split)})
        for task in tasks:
            for name in KIND_NAMES.values():
                values = [_cells(each, split).get(task, {}).get(name) for each in cards]
                if any(value is not None for value in values):
                    rows.append(
                        _row(split, f"{task} {name}", _GOOD[split], values, task=task, part=name)
                    )
    for name, title, good in TOTALS:
        values = [getattr(each.card, name) for each in cards]
        rows.append(_row("total", title, good, values, part=name))
    return {
        "columns": [
            {
                "role": each.role,
                "label": each.label,
                "source": each.source,
                "model": each.model,
                "rows": each.card.details.get("rows"),
                "dtype": each.card.details.get("dtype"),
            }
            for each in cards
        ],
        "rows": rows,
    }


def training(material: Material) -> dict[str, Any]:
    """Courses of the two terms, the candidates, and why one was chosen."""
    selection = material.manifest["selection"]
    chosen = selection["chosen_step"]
    candidates = [
        {
            "step": candidate["step"],
            **_measured(candidate["measured"]),
            "score": candidate["score"],
            "destroyed": candidate["destroyed"],
            "chosen": candidate["step"] == chosen,
        }
        for candidate in selection["candidates"]
    ]
    curve = None
    if material.metrics is not None:
        steps = [entry for entry in material.metrics if "forget" in entry]
        if steps:
            curve = {name: _course(steps, name) for name in ("forget", "retain")}
    return {
        "steps": material.manifest["steps"],
        "chosen_step": chosen,
        "why": selection["why"],
        "stopped": selection["stopped"],
        "judgement": selection.get("judgement"),
        "target": None if selection.get("target") is None else _measured(selection["target"]),
        "candidates": candidates,
        "curve": curve,
    }


def layers(material: Material) -> dict[str, Any] | None:
    """What was read of every layer, and what a sweep over layers found; None without either."""
    choice = material.manifest["method_notes"].get("layer_choice")
    source = "expunge.json"
    sweep = None
    if material.layers is not None:
        try:
            choice = material.layers["prediction"]
            sweep = {
                "results": [
                    {
                        "layer": int(each["layer"]),
                        "value": plain(each["value"]),
                        "failure": each["failure"],
                        **{name: _of(each["scores"], name) for name, _, _ in TOTALS},
                    }
                    for each in material.layers["layers"]
                ],
                "agreement": dict(material.layers["agreement"]),
                "complete": material.layers["status"] == "complete",
            }
        except (KeyError, TypeError, ValueError):
            raise InputError(
                "layers.json: is not as expunge analyze layers writes it; make it anew"
            ) from None
        source = "layers.json"
    if choice is None:
        return None
    try:
        readings = [
            {"layer": int(each["layer"]), **{name: plain(each.get(name)) for name in _SHARES}}
            for each in choice["readings"]
        ]
        return {
            "source": source,
            "chosen": int(choice["layer"]),
            "why": choice["why"],
            "warning": choice["warning"],
            "readings": readings,
            "sweep": sweep,
        }
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{source}: its layer readings are not as expunge writes them; make them anew"
        ) from None


def weights(material: Material) -> dict[str, Any]:
    """Changed tensors, and by layer the norm of their change relative to that of the tensors."""
    tensors = [
        {key: each[key] for key in ("name", "dtype")}
        | {key: float(each[key]) for key in ("norm", "change_norm", "changed_share")}
        for each in material.manifest["changed_tensors"]
    ]
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    outside = []
    for tensor in tensors:
        layer = layer_of(tensor["name"])
        if layer is None:
            outside.append(tensor["name"])
        else:
            by_layer.setdefault(layer, []).append(tensor)
    return {
        "tensors": tensors,
        "layers": [
            {"layer": layer, "tensors": len(mine), **relative_change(mine)}
            for layer, mine in sorted(by_layer.items())
        ],
        "outside_layers": outside,
        "layer_count": material.layer_count,
    }


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor's name says; the first number in it stands for the layer."""
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else int(found[1])


def relative_change(tensors: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Frobenius norms over all of the tensors together, and their ratio; None for tensors of zeros."""
    norm = math.sqrt(math.fsum(each["norm"] ** 2 for each in tensors))
    change = math.sqrt(math.fsum(each["change_norm"] ** 2 for each in tensors))
    return {"norm": norm, "change_norm": change, "relative": change / norm if norm else None}


def record(material: Material) -> dict[str, Any]:
    """Settings, versions, hashes, cost: what a repetition needs."""
    manifest = material.manifest
    settings = manifest["settings"]
    environment = manifest["environment"]
    return {
        "expunge": manifest["expunge"],
        "seed": manifest.get("seed"),
        "preset": settings.get("preset"),
        "preset_source": settings.get("preset_source"),
        "inputs": flat(settings["inputs"]),
        "method": flat(settings["method"]),
        "training": flat(settings["training"]),
        "notes": flat(
            {key: v for key, v in manifest["method_notes"].items() if key != "layer_choice"}
        ),
        "device": manifest.get("device"),
        "processes": manifest.get("processes"),
        "environment": flat(environment),
        "seconds": dict(manifest["seconds"]),
        "peak_memory_bytes": dict(manifest["peak_memory_bytes"]),
        "resumed_from_steps": list(manifest.get("resumed_from_steps", [])),
        "warnings": list(manifest["warnings"]),
        "hashes": {
            "target": dict(manifest["model_sha256"]),
            "data": dict(manifest["data_hmac_sha256"]),
            "run": dict(manifest["output_sha256"]),
        },
        "changed_files": list(material.changed_files),
        "missing_files": list(material.missing_files),
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; lists stay as they are."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _measured(values: Mapping[str, Any]) -> dict[str, float | None]:
    """All that a run measures; an older run measured less."""
    return {field.name: plain(values.get(field.name)) for field in fields(Measured)}


def _row(
    split: str,
    title: str,
    good: str,
    values: Sequence[float | None],
    *,
    task: str | None = None,
    part: str,
) -> dict[str, Any]:
    return {
        "split": split, "task": task, "part": part, "title": title, "good": good,
        "values": list(values),
    }  # fmt: skip


def _cells(each: Card, split: str) -> Mapping[str, Mapping[str, float | None]]:
    return each.card.forget if split == "forget" else each.card.retain


def _course(steps: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """First, last, least and greatest value, and the points that are drawn; None without values."""
    points = [(float(entry["step"]), plain(entry.get(name))) for entry in steps]
    known = [value for _, value in points if value is not None]
    if not known:
        return None
    return {
        "first": known[0],
        "last": known[-1],
        "least": min(known),
        "greatest": max(known),
        "steps": len(known),
        "drawn": [list(point) for point in thinned(points)],
    }


def _of(scores: Any, name: str) -> float | None:
    return None if scores is None else plain(scores[name])
