"""The report's section on the audit: attacks with their intervals, and which facts came back, by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.errors import InputError
from expunge.reporting.material import Material

MODELS = ("target", "unlearned", "oracle")
_RECOVERED = ("name", "title", "value", "low", "high", "against")


def attacks(material: Material) -> dict[str, Any] | None:
    """None without an audit. Raises InputError where audit.json lacks what its schema demands."""
    audit = material.audit
    if audit is None:
        return None
    try:
        requests = [_request(request) for request in audit["requests"]]
        if not requests:
            raise ValueError
        verdict = dict(audit["verdict"])
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
            "settings": _settings(audit["settings"]),
            "expunge": audit["expunge"],
        }
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise InputError(
            f"{material.audit_source}: is not as expunge audit writes it; make it anew"
        ) from None


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the audit. Raises KeyError where one that the page names is not there."""
    budget = {**given["budget"], "name": given["budget"]["name"]}
    return {**given, "budget": budget, "seed": given["seed"]}


def _request(request: Mapping[str, Any]) -> dict[str, Any]:
    found = [_attack(name, attack) for name, attack in request["attacks"].items()]
    return {
        "source": request["forget"]["source"],
        "rows": request["forget"]["rows"],
        "documents": request["forget"]["documents"],
        "hmac_sha256": str(request["forget"]["hmac_sha256"]),
        "audited": dict(request["audited"]),
        "verdict": dict(request["verdict"]),
        "kept": request["kept"],
        "attacks": found,
        "not_run": dict(request["not_run"]),
        "came_back": _came_back(request),
        "facts": _facts(request),
    }


def _attack(name: str, attack: Mapping[str, Any]) -> dict[str, Any]:
    recovered = attack["recovered"]
    models: dict[str, Any] = {}
    for model in MODELS:
        result = attack["models"].get(model)
        if result is None:
            models[model] = None
            continue
        models[model] = {
            "extracted": result.get("extracted"),
            "variants": {
                variant: {key: values[key] for key in ("auc", "tpr", "extracted") if key in values}
                for variant, values in result["variants"].items()
            },
            "lost": result.get("lost"),
        }
    return {
        "name": name,
        "title": attack["title"],
        "kind": attack["kind"],
        "reference": attack["reference"],
        "has_power": attack["power"]["has_power"],
        "why_no_power": attack["power"]["why"],
        "sentence": attack["sentence"],
        "value": None if recovered is None else recovered["value"],
        "low": None if recovered is None else recovered["low"],
        "high": None if recovered is None else recovered["high"],
        "against": None if recovered is None else recovered["against"],
        "blind": attack.get("blind"),
        "beyond_target": attack.get("beyond_target"),
        "tunings": [{"name": key, **each} for key, each in attack.get("tunings", {}).items()],
        "models": models,
    }


def _strongest(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The extraction attack that recovered most from any request; None where none has power.

    What is read inside comes back by no attack, and has a rule of its own in the verdict.
    """
    found = [
        {**{key: attack[key] for key in _RECOVERED}, "request": number}
        for number, request in enumerate(requests, 1)
        for attack in request["attacks"]
        if attack["kind"] == "extraction" and attack["value"] is not None
    ]
    return max(found, key=lambda each: (each["value"], each["high"] or 0.0), default=None)


def _powerful(request: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (name, attack)
        for name, attack in request["attacks"].items()
        if attack["kind"] == "extraction" and attack["power"]["has_power"]
    ]


def _came_back(request: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many facts at least one attack with power got from each model."""
    powerful = _powerful(request)
    if not powerful:
        return None
    ids = {row["id"] for _, attack in powerful for row in attack["rows"]}
    counts: dict[str, Any] = {"facts": len(ids), "attacks": len(powerful)}
    for model in MODELS:
        outcomes = [
            (row["id"], row["outcomes"][model])
            for _, attack in powerful
            for row in attack["rows"]
            if model in row["outcomes"]
        ]
        got = {row for row, outcome in outcomes if outcome["extracted"]}
        counts[model] = len(got) if outcomes else None
    return counts


def _facts(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By id the facts that came back from the unlearned model, and in which attacks."""
    found: dict[str, dict[str, Any]] = {}
    for _, attack in _powerful(request):
        for row in attack["rows"]:
            outcomes = row["outcomes"]
            if not outcomes["unlearned"]["extracted"]:
                continue
            fact = found.setdefault(
                row["id"],
                {"id": row["id"], "document": row["document"], "attacks": [], "oracle": False},
            )
            fact["attacks"].append(attack["title"])
            fact["oracle"] |= bool(outcomes.get("oracle", {}).get("extracted"))
    return list(found.values())


def _weakest(verdict: Mapping[str, Any], requests: Any) -> dict[str, Any] | None:
    """The attack that the verdict rests on, with its own sentence."""
    if verdict["weakest"] is None:
        return None
    for request in requests:
        if request["verdict"]["sentence"] != verdict["sentence"]:
            continue
        for attack in request["attacks"]:
            if attack["name"] == verdict["weakest"]:
                return {key: attack[key] for key in ("name", "title", "sentence")}
    return {
        "name": verdict["weakest"],
        "title": verdict["weakest"],
        "sentence": verdict["sentence"],
    }
