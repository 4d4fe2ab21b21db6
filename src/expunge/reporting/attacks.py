"""The report's section on the audit: attacks with their intervals, and which facts came back, by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.audits.base import MODELS
from expunge.errors import InputError
from expunge.reporting.material import Material

_RECOVERED = ("value", "low", "high", "against")


def attacks(material: Material) -> dict[str, Any] | None:
    """None without an audit. Raises InputError where audit.json lacks what its schema demands."""
    audit = material.audit
    if audit is None:
        return None
    try:
        requests = [_request(request) for request in audit["requests"]]
        if not requests:
            raise ValueError
        verdict, settings = dict(audit["verdict"]), audit["settings"]
        budget = {**settings["budget"], "name": settings["budget"]["name"]}
        return {
            "source": material.audit_source,
            "verdict": verdict,
            "weakest": _weakest(verdict, requests),
            "requests": requests,
            "strongest": _strongest(requests),
            "models": {
                name: {"path": model["path"], "dtype": model["dtype"]}
                for name, model in audit["models"].items()
            },
            # Raises KeyError where one that the page names is not there.
            "settings": {**settings, "budget": budget, "seed": settings["seed"]},
            "expunge": audit["expunge"],
        }
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise InputError(
            f"{material.audit_source}: is not as expunge audit writes it; make it anew"
        ) from None


def _request(request: Mapping[str, Any]) -> dict[str, Any]:
    forget = request["forget"]
    powerful = [
        attack
        for attack in request["attacks"].values()
        if attack["kind"] == "extraction" and attack["power"]["has_power"]
    ]
    return {
        **{key: forget[key] for key in ("source", "rows", "documents")},
        "hmac_sha256": str(forget["hmac_sha256"]),
        **{key: dict(request[key]) for key in ("audited", "verdict", "not_run")},
        "kept": request["kept"],
        "attacks": [_attack(name, attack) for name, attack in request["attacks"].items()],
        "came_back": _came_back(powerful),
        "facts": _facts(powerful),
    }


def _attack(name: str, attack: Mapping[str, Any]) -> dict[str, Any]:
    models: dict[str, Any] = dict.fromkeys(MODELS)
    for model, result in attack["models"].items():
        models[model] = {
            "extracted": result.get("extracted"),
            "variants": {
                variant: {key: values[key] for key in ("auc", "tpr", "extracted") if key in values}
                for variant, values in result["variants"].items()
            },
            "lost": result.get("lost"),
        }
    recovered = attack["recovered"] or dict.fromkeys(_RECOVERED)
    return {
        "name": name,
        **{key: attack[key] for key in ("title", "kind", "reference", "sentence")},
        "has_power": attack["power"]["has_power"],
        "why_no_power": attack["power"]["why"],
        **{key: recovered[key] for key in _RECOVERED},
        **{key: attack.get(key) for key in ("blind", "beyond_target", "depth")},
        "tunings": [{"name": key, **each} for key, each in attack.get("tunings", {}).items()],
        "models": models,
    }


def _strongest(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The extraction attack that recovered most from any request; None where none has power.

    What is read inside comes back by no attack, and has a rule of its own in the verdict.
    """
    found = [
        {**{key: attack[key] for key in ("name", "title", *_RECOVERED)}, "request": number}
        for number, request in enumerate(requests, 1)
        for attack in request["attacks"]
        if attack["kind"] == "extraction" and attack["value"] is not None
    ]
    return max(found, key=lambda each: (each["value"], each["high"] or 0.0), default=None)


def _came_back(powerful: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many facts at least one attack with power got from each model."""
    if not powerful:
        return None
    rows = [row for attack in powerful for row in attack["rows"]]
    counts: dict[str, Any] = {"facts": len({row["id"] for row in rows}), "attacks": len(powerful)}
    for model in MODELS:
        outcomes = {
            (row["id"], row["outcomes"][model]["extracted"]) for row in rows if model in row["outcomes"]
        }
        counts[model] = sum(got for _, got in outcomes) if outcomes else None
    return counts


def _facts(powerful: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By id the facts that came back from the unlearned model, and in which attacks."""
    found: dict[str, dict[str, Any]] = {}
    for attack in powerful:
        for row in attack["rows"]:
            if row["outcomes"]["unlearned"]["extracted"]:
                named = {"id": row["id"], "document": row["document"]}
                fact = found.setdefault(row["id"], {**named, "attacks": [], "oracle": False})
                fact["attacks"].append(attack["title"])
                fact["oracle"] |= bool(row["outcomes"].get("oracle", {}).get("extracted"))
    return list(found.values())


def _weakest(verdict: Mapping[str, Any], requests: Any) -> dict[str, Any] | None:
    """The attack that the verdict rests on, with its own sentence."""
    name = verdict["weakest"]
    if name is None:
        return None
    for request in requests:
        for attack in request["attacks"]:
            if attack["name"] == name and request["verdict"]["sentence"] == verdict["sentence"]:
                return {key: attack[key] for key in ("name", "title", "sentence")}
    return {"name": name, "title": name, "sentence": verdict["sentence"]}
