"""What a reviewer wants behind the first page: scorecard, training, weights, record."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from expunge.evaluation.outcomes import Measured
from expunge.reporting.figures import thinned
from expunge.reporting.material import Material, plain
from expunge.reporting.tables import score_rows


def scorecard(material: Material) -> dict[str, Any] | None:
    """Every part of every card, by task; None where there is no card."""
    if not material.cards:
        return None
    columns = [
        {
            **{key: getattr(each, key) for key in ("role", "source", "model")},
            **{key: each.card.details.get(key) for key in ("rows", "dtype")},
        }
        for each in material.cards
    ]
    return {"columns": columns, "rows": score_rows([each.card for each in material.cards])}


def training(material: Material) -> dict[str, Any]:
    """Courses of the two terms, the candidates, and why one was chosen."""
    selection = material.manifest["selection"]
    target, chosen = selection.get("target"), selection["chosen_step"]
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
    steps = [entry for entry in material.metrics or () if "forget" in entry]
    return {
        "steps": material.manifest["steps"],
        "chosen_step": chosen,
        "why": selection["why"],
        "stopped": selection["stopped"],
        "judgement": selection.get("judgement"),
        "target": None if target is None else _measured(target),
        "candidates": candidates,
        "curve": {name: _course(steps, name) for name in ("forget", "retain")} if steps else None,
    }


def weights(material: Material) -> dict[str, Any]:
    """Changed tensors, and by layer the norm of their change relative to that of the tensors."""
    tensors = [
        {key: each[key] for key in ("name", "dtype")}
        | {key: float(each[key]) for key in ("norm", "change_norm", "changed_share")}
        for each in material.manifest["changed_tensors"]
    ]
    by_layer: dict[int | None, list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        by_layer.setdefault(_layer_of(tensor["name"]), []).append(tensor)
    outside = by_layer.pop(None, [])
    return {
        "tensors": tensors,
        "layers": [
            {"layer": layer, "tensors": len(mine), **_relative_change(mine)}
            for layer, mine in sorted(by_layer.items())
        ],
        "outside_layers": [tensor["name"] for tensor in outside],
    }


def _layer_of(name: str) -> int | None:
    """The decoder layer that a tensor's name says; the first number in it stands for the layer."""
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else int(found[1])


def _relative_change(tensors: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Frobenius norms over all of the tensors together, and their ratio; None for tensors of zeros."""
    norm = math.sqrt(math.fsum(each["norm"] ** 2 for each in tensors))
    change = math.sqrt(math.fsum(each["change_norm"] ** 2 for each in tensors))
    return {"norm": norm, "change_norm": change, "relative": change / norm if norm else None}


def record(material: Material) -> dict[str, Any]:
    """Settings, versions, hashes, cost: what a repetition needs."""
    manifest = material.manifest
    settings, notes = manifest["settings"], dict(manifest["method_notes"])
    notes.pop("layer_choice", None)
    return {
        "expunge": manifest["expunge"],
        **{key: manifest.get(key) for key in ("seed", "device", "processes")},
        **{key: settings.get(key) for key in ("preset", "preset_source")},
        **{key: _flat(settings[key]) for key in ("inputs", "method", "training")},
        "notes": _flat(notes),
        "environment": _flat(manifest["environment"]),
        **{key: dict(manifest[key]) for key in ("seconds", "peak_memory_bytes")},
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; lists stay as they are."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _measured(values: Mapping[str, Any]) -> dict[str, float | None]:
    """All that a run measures; an older run measured less."""
    return {field.name: plain(values.get(field.name)) for field in fields(Measured)}


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
