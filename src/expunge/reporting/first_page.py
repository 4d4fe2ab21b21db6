"""The first page, for the engineer with a request: asked, done, tried, what remains, what it cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.audits.base import MODELS
from expunge.data.fingerprints import same_data
from expunge.data.rows import document_of
from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.scorecard import Scorecard, Split
from expunge.evaluation.sentences import scores_sentence
from expunge.methods.catalog import METHODS
from expunge.reporting.material import Material

VERDICTS: Mapping[str | None, tuple[str, str]] = {
    "destroyed": (
        "Destroyed",
        "The model lost most of what it was to keep, so what it forgot counts for nothing.",
    ),
    "not forgotten": (
        "Not forgotten",
        "At least one attack brings back half or more of what was to be removed.",
    ),
    "partly forgotten": (
        "Partly forgotten",
        "Some of what was to be removed comes back, or the model still betrays that it knew it.",
    ),
    "over-unlearned": (
        "Over-unlearned",
        "The model shows that something was removed. What it forgot looks stranger to it than text that"
        " it never saw, or a word of it breaks other answers.",
    ),
    "forgotten": (
        "Forgotten, as far as was tried",
        "No attack of this audit got back as much as counts. Others may exist.",
    ),
    None: ("No verdict", "The audit could not decide."),
}
_REFERENCES: Mapping[str | None, str] = {
    "nonmembers": "Forget rows were to look like non-members, text that the model never saw.",
    "base": "Forget rows were to look as they do to the model from before the fine-tune.",
    "counterfactuals": "Forget rows were to look as they do with other names and words in them.",
    "ceiling": "No text said how far to go: forget rows went as far as the settings say.",
    None: "",
}
_MEASURES = {
    "forget": (
        "Forget set, asked plainly",
        "How much of what was to be removed does the model still say? Mean of the forget scores.",
        "low: 0, or what the oracle has",
    ),
    "strongest_attack": (
        "Strongest attack",
        "Of what the target knows beyond a model that never saw it, the share that the best attack"
        " gets back.",
        "low: 0",
    ),
    "mia_auc": (
        "Membership (MIA AUC)",
        "Do the removed documents look as familiar to the model as text that it never saw?"
        " 1: they look known. 0: they look suspiciously strange.",
        "0.5: they look alike",
    ),
    "retain": (
        "Retain set, asked plainly",
        "How much of what was to stay does the model still say? Mean of the retain scores.",
        "high: what the target has",
    ),
    "utility": (
        "Utility",
        "Share of general questions with four choices that are answered rightly; guessing gives 0.25.",
        "high: what the target has",
    ),
    "task_aggregate": (
        "Task aggregate",
        "Forgetting and keeping in one number: the harmonic mean of all scores, forget ones as 1 minus"
        " the score. It is 0 as soon as one of them is at its worst.",
        "high: 1",
    ),
}
"""What each number of the page is called and asks, and what is good."""
_NO_VERDICT: Mapping[str, Any] = {"sentence": None, "findings": []}
_NOT_AUDITED = (
    "Nobody has tried to get the removed content back. Scores, if there are any, say only what the"
    " model answers when it is asked plainly."
)


def asked(material: Material) -> dict[str, Any]:
    """How much was to be removed and kept, of which files, and when that was asked for."""
    rows, sources = material.manifest["rows"], material.manifest["settings"]["inputs"]
    sets = {
        role: {
            "rows": rows[role],
            "documents": _documents(material, role),
            "source": sources.get(role),
        }
        for role in rows
    }
    return {
        **{role: sets.get(role) for role in ("forget", "retain", "nonmembers")},
        "requested": material.inputs.requested,
        "subject": material.inputs.subject,
    }


def done(material: Material) -> dict[str, Any]:
    """The method in a sentence, and when the run was finished."""
    manifest = material.manifest
    settings = manifest["settings"]
    return {
        "method": settings["method"]["name"],
        "sentence": _method_sentence(settings["method"]["name"]),
        "yardstick": _REFERENCES.get(settings["training"].get("yardstick"), ""),
        "preset": settings.get("preset"),
        "model": settings["inputs"]["model"],
        "steps": manifest["steps"],
        "chosen_step": manifest["selection"]["chosen_step"],
        "changed_tensors": len(manifest["changed_tensors"]),
        "finished": material.finished,
        "finished_from": material.finished_from,
    }


def summary(material: Material, audit: Mapping[str, Any] | None) -> dict[str, Any]:
    """The verdict in a sentence with its weakest finding, what remains, what it cost, and cautions.

    `audit` is the report's own section on the audit.
    """
    after, judgement = material.card("unlearned"), _judgement(material)
    found = [] if after is None else of_scores(after, material.card("target"))
    scored = [scores_sentence(finding) for finding in found]
    if audit is None:
        worst = found[0].name if found else None
        if worst is None and judgement is not None and judgement["ending"] != "unlearned":
            worst = judgement["ending"]
        title = "Not audited" + (f"; by what was measured: {worst}" if worst else "")
        status, meaning, verdict = "not audited", _NOT_AUDITED, _NO_VERDICT
    else:
        verdict = audit["verdict"]
        status = verdict["verdict"] or "no verdict"
        title, meaning = VERDICTS[verdict["verdict"]]
    return {
        "audited": audit is not None,
        "status": status.replace(" ", "-"),
        "title": title,
        "meaning": meaning,
        "sentence": verdict["sentence"],
        "weakest": None if audit is None else audit["weakest"],
        "findings": verdict["findings"],
        "also": [] if audit is None else _also(audit),
        "tried": [] if audit is None else _tried(audit),
        "remains": _remains(material, audit),
        "cost": _cost(material, audit),
        "cautions": _cautions(material, scored),
        "scorecard_findings": scored,
        "run_judgement": judgement,
    }


def _judgement(material: Material) -> Mapping[str, Any] | None:
    """Where the run says that it ended; None where it measured nothing."""
    judgement = material.manifest["selection"].get("judgement")
    return judgement if isinstance(judgement, Mapping) else None


def _also(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By verdict the attacks that speak against the unlearning beside the one that decides."""
    attacks = [attack for request in audit["requests"] for attack in request["attacks"]]
    titles = {attack["name"]: attack["title"] for attack in attacks}
    found: dict[str, list[str]] = {}
    for finding in audit["verdict"]["findings"][1:]:
        title = titles.get(finding["attack"], finding["attack"])
        found.setdefault(finding["verdict"], []).append(title)
    return [{"verdict": verdict, "attacks": names} for verdict, names in found.items()]


def measures(material: Material, audit: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The few numbers of the first page: what each asks, its direction, and each model's value."""
    cards = {role: material.card(role) for role in MODELS}
    found = []
    for name, (title, question, good) in _MEASURES.items():
        values: dict[str, Any] = dict.fromkeys(MODELS)
        measure: dict[str, Any] = {"name": name, "title": title, "question": question, "good": good}
        measure |= {"values": values, "low": None, "high": None}
        if name == "strongest_attack":
            measure |= {} if audit is None else _strongest(title, audit)
        else:
            values |= {role: _read(card, name) for role, card in cards.items() if card is not None}
        found.append(measure)
    return found


def _read(card: Scorecard, name: Any) -> float | None:
    return card.mean(name) if name in ("forget", "retain") else getattr(card, name)


def _strongest(title: str, audit: Mapping[str, Any]) -> dict[str, Any]:
    """The attack that recovered most: 1 is the target and 0 the floor, by what the share is."""
    worst, requests = audit["strongest"], len(audit["requests"])
    if worst is None:
        return {}
    oracle = 0.0 if worst["against"] == "oracle" else None
    which = f" (request {worst['request']} of {requests})" if requests > 1 else ""
    return {
        "title": f"{title}: {worst['title']}{which}",
        "values": {"target": 1.0, "unlearned": worst["value"], "oracle": oracle},
        "low": worst["low"],
        "high": worst["high"],
    }


def _method_sentence(name: str) -> str:
    """The first line of the method's own page of code, so that it is said once."""
    if name not in METHODS:
        return f"{name}, a method that this version of expunge does not know."
    words = sys.modules[METHODS[name].__module__].__doc__ or name
    return words.strip().splitlines()[0]


def _documents(material: Material, role: str) -> int | None:
    """From the rows where they were given, else what the audit counted of the same file."""
    if role in material.rows:
        return len({document_of(row) for row in material.rows[role]})
    if role == "forget" and material.audit is not None:
        given = material.audit["requests"][0]["forget"]
        if same_data(given["hmac_sha256"], material.manifest["data_hmac_sha256"]["forget"]):
            return int(given["documents"])
    return None


def _tried(audit: Mapping[str, Any]) -> list[str]:
    """By request the attacks that claim something, those that cannot, and those that were not run."""
    said = []
    for request in audit["requests"]:
        able, unable = (
            ", ".join(each["title"] for each in request["attacks"] if each["has_power"] is power)
            for power in (True, False)
        )
        asked, rows = request["audited"]["rows"], request["rows"]
        said.append(
            f"{request['source']}, {asked} of {rows} rows, budget {audit['settings']['budget']['name']}:"
            f" {able or 'no attack that works on the target'}."
        )
        if unable:
            said.append(f"Without power on the target, so without a claim: {unable}.")
        if request["not_run"]:
            said.append(f"Not tried: {', '.join(request['not_run'])}.")
    return said


def _remains(material: Material, audit: Mapping[str, Any] | None) -> list[str]:
    sentence = _beside(material, "forget")
    if sentence is None:
        said = [_by_validation(material, "forget")]
    else:
        said = [f"Asked plainly, the model still gives back {sentence} of the forget set."]
    if audit is None:
        return [*said, "What an attack can get back was not measured."]
    return said + [_came_back(request) for request in audit["requests"]]


def _came_back(request: Mapping[str, Any]) -> str:
    counts = request["came_back"]
    if counts is None:
        return f"{request['source']}: no attack had power, so nothing can be said."
    beside = f"from the target {counts['target']}"
    if counts["oracle"] is not None:
        beside += f", from the oracle {counts['oracle']}"
    return (
        f"Of {counts['facts']} facts that were attacked, {counts['unlearned']} came back in at least"
        f" one of {counts['attacks']} attacks that work on the target ({beside}). The request has"
        f" {request['rows']} rows."
    )


def _cost(material: Material, audit: Mapping[str, Any] | None) -> list[str]:
    said = []
    sentence = _beside(material, "retain")
    if sentence is not None:
        said.append(f"Asked plainly, the model gives back {sentence} of the retain set.")
    elif "retain" in material.manifest["rows"]:
        said.append(_by_validation(material, "retain"))
    else:
        said.append("The run was given no retain set, so what it cost was not watched.")
    # Every request's is of the same retain rows.
    kept = None if audit is None else audit["requests"][0]["kept"]
    if kept is not None and kept["value"] is not None:
        said.append(f"By the audit, {kept['value']:.0%} of the target's retain answers are left.")
    after, before = material.card("unlearned"), material.card("target")
    if after is not None and after.utility is not None:
        was = "" if before is None or before.utility is None else f", the target {before.utility:.1%}"
        said.append(f"General questions: {after.utility:.1%} right{was}; guessing gives 25%.")
    else:
        said.append("General ability (utility) was not measured.")
    return said


def _beside(material: Material, split: Split) -> str | None:
    """What the model gives back, beside the target and the oracle; None where it was not scored."""
    cards = {role: material.card(role) for role in MODELS}
    told = {role: card.mean(split) for role, card in cards.items() if card is not None}
    said = {role: f"{value:.1%}" for role, value in told.items() if value is not None}
    others = [f"the {role} {said[role]}" for role in ("target", "oracle") if role in said]
    beside = ", ".join(others) or "the target was not measured"
    return f"{said['unlearned']} ({beside})" if "unlearned" in said else None


def _by_validation(material: Material, split: str) -> str:
    """What the run measured itself, on a sample and by teacher forcing, where no scorecard is."""
    selection, said = material.manifest["selection"], f"The {split} set was not scored."
    key, step = f"{split}_accuracy", selection["chosen_step"]
    chosen = [each["measured"] for each in selection["candidates"] if each["step"] == step]
    after = chosen[0].get(key) if chosen else None
    before = (selection.get("target") or {}).get(key)
    rows = (material.manifest["settings"]["training"].get("validation_rows") or {}).get(split)
    if after is None or before is None or not rows:
        return said
    return (
        f"{said} On {rows} of its rows that the run measured itself, teacher-forced, accuracy"
        f" is {after:.1%}, the target's {before:.1%}."
    )


def _cautions(material: Material, scored: Sequence[str]) -> list[str]:
    """Everything that a reader must know before trusting the rest."""
    warnings, judgement = material.manifest["warnings"], _judgement(material)
    said = [_sentence(f"Scorecard: {finding}") for finding in scored]
    said += [_sentence(f"Run: {warning}") for warning in warnings]
    if judgement is not None and judgement["ending"] != "unlearned":
        known = f"the kept checkpoint is {judgement['ending']}"
        if not any(known in warning for warning in warnings):
            said.append(f"Run: {known}: {judgement['why']}.")
    if material.changed_files:
        said.append(
            "Files have changed since the run, so that this report may not be about them:"
            f" {', '.join(material.changed_files)}."
        )
    if material.missing_files:
        said.append(f"Files of the run are gone: {', '.join(material.missing_files)}.")
    return said + _mismatches(material)


def _sentence(words: str) -> str:
    return words if words.endswith((".", "?", "!")) else f"{words}."


def _mismatches(material: Material) -> list[str]:
    said = []
    rows = material.manifest["rows"]
    for each in material.cards:
        if each.role != "oracle" and not each.is_checked:
            said.append(
                f"The scores of {each.role}, {each.source}, hold no hash of the weights they were"
                f" measured on ({each.model or 'not named'}), so that they may be another model's."
            )
        scored = each.card.details.get("rows")
        for split in ("forget", "retain"):
            count = scored.get(split) if isinstance(scored, Mapping) else None
            if split in rows and count and count != rows[split]:
                said.append(
                    f"The scores of {each.role} are of {count} {split} rows, the run had {rows[split]}."
                )
    if material.audit is not None:
        given = material.audit["requests"][0]["forget"]["hmac_sha256"]
        if same_data(given, material.manifest["data_hmac_sha256"]["forget"]) is False:
            said.append("The audit was made with another forget file than the run.")
    return said
