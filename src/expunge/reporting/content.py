"""report.json: everything that a report says, once; the page is drawn from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import expunge
from expunge.data.fingerprints import named
from expunge.errors import InputError
from expunge.models.files import MANIFEST
from expunge.reporting.attacks import attacks
from expunge.reporting.details import record, scorecard, training, weights
from expunge.reporting.first_page import asked, done, measures, summary
from expunge.reporting.material import Material

FORMAT = "expunge-report/2"


def content(material: Material) -> dict[str, Any]:
    """The report. Raises InputError where a file that was read is not as expunge writes it."""
    audit = attacks(material)
    try:
        of_the_run = {
            "training": training(material),
            "weights": weights(material),
            "record": record(material),
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{material.directory / MANIFEST}: is not as this version of expunge run writes it; run"
            " again with this one, or report with that one"
        ) from None
    return {
        "format": FORMAT,
        "expunge": expunge.__version__,
        "run": named(str(material.directory)),
        "asked": asked(material),
        "done": done(material),
        "summary": summary(material, audit),
        "measures": measures(material, audit),
        "not_measured": _not_measured(material, audit),
        "scorecard": scorecard(material),
        "audit": audit,
        **of_the_run,
        "revealed": _revealed(material) if material.inputs.reveal else None,
    }


def _not_measured(material: Material, audit: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """What nobody measured, and the command that measures it."""
    manifest, sides = material.manifest, "--forget FORGET --retain RETAIN"
    scores = f"expunge evaluate {{}} {sides} --nonmembers N --mmlu DIR --output {{}}"
    mine = scores.format("RUN", "RUN/scores.json")
    missing: list[tuple[str, str]] = []
    after = material.card("unlearned")
    if after is None:
        missing.append(("The scorecard of the unlearned model", mine))
    else:
        parts = {
            "the retain set": after.mean("retain"),
            "membership inference": after.mia_auc,
            "utility": after.utility,
        }
        gone = ", ".join(name for name, value in parts.items() if value is None)
        if gone:
            missing.append((f"Of the unlearned model's scorecard: {gone}", mine))
    if material.card("target") is None:
        what = "The target's scorecard, so there is no before"
        missing.append((what, scores.format("TARGET", "before.json")))
    if material.card("oracle") is None:
        what = "An oracle's scorecard: what a model that never saw the rows would score"
        missing.append((what, scores.format("ORACLE", "oracle.json")))
    if audit is None:
        mend = f"expunge audit RUN --original TARGET {sides} --output RUN/audit.json"
        missing.append(("An audit: whether attacks get the removed content back", mend))
    elif "oracle" not in audit["models"]:
        what = "An oracle in the audit: recovered shares are against 0, not against a model that"
        missing.append((f"{what} never saw the rows", "expunge audit ... --oracle ORACLE"))
    mend = "expunge audit without --attacks, which runs all that it is given the means for"
    for request in audit["requests"] if audit is not None else ():
        reasons: dict[str, list[str]] = {}
        for name, why in request["not_run"].items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            attacks = f"Attack{'s' if len(names) > 1 else ''} {', '.join(names)}"
            missing.append((f"{attacks} on {request['source']}: {why}", mend))
    if material.metrics is None:
        what = "The course of the training: metrics.jsonl is gone"
        missing.append((what, "repeat the run"))
    if manifest["selection"].get("target") is None:
        missing.append(("Candidates during the run", "repeat it: expunge run --select best"))
    if asked(material)["forget"]["documents"] is None:
        what = "The number of documents in the forget set"
        missing.append((what, "expunge report RUN --forget FORGET"))
    if manifest["settings"]["inputs"].get("retain") is None:
        what = "What the run cost: it was given no retain set"
        missing.append((what, "repeat it: expunge run --retain RETAIN"))
    return [{"what": what, "mend": mend} for what, mend in missing]


def _revealed(material: Material) -> dict[str, Any]:
    """The rows' text, and what the audit got from the unlearned model where that was kept too."""
    generated: dict[str, list[dict[str, str]]] = {}
    if material.audit is not None:
        for attack in material.audit["requests"][0]["attacks"].values():
            for variant, texts in attack.get("texts", {}).get("unlearned", {}).items():
                for name, text in texts.items():
                    generated.setdefault(name, []).append(
                        {"attack": attack["title"], "variant": variant, "text": text}
                    )
    return {
        role: [
            {
                "id": row.id,
                "task": row.task,
                "input": row.input,
                "output": row.output,
                "generated": generated.get(row.id, []),
            }
            for row in rows
        ]
        for role, rows in material.rows.items()
    }
