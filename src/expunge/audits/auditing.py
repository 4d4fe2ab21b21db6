"""One audit, from files to audit.json: everything is checked, then each model is attacked in turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import expunge
from expunge.analysis.template_choice import settled
from expunge.audits.base import MODELS, Attack, Found, ModelName
from expunge.audits.budgets import BUDGETS
from expunge.audits.inputs import (
    FORMAT,
    AuditInputs,
    Request,
    check_output,
    checked_models,
    fitted,
    planned_here,
    read_sets,
    requests_of,
)
from expunge.audits.partial import Partial, check_cache
from expunge.audits.subject import Subject
from expunge.audits.summary import kept_share, known_facts, summarise
from expunge.audits.verdict import Evidence, Verdict, judge_audit, worst_of
from expunge.data.fingerprints import data_fingerprint, named, users_secret
from expunge.data.rows import Row, RowSet, document_of
from expunge.disk import deliver
from expunge.models.devices import resolve_device
from expunge.models.loading import load_model, resolve_dtype, said_of_dtype
from expunge.models.text_forms import text_policies
from expunge.runs.manifest import finite
from expunge.training.progress import Progress, Silent

Results = dict[tuple[int, str], dict[ModelName, Found]]
"""By request and attack what was found on each model."""
_LIBRARIES = ("torch", "transformers", "scikit-learn")
_UNITS = 100
"""Parts of one attack in the progress bar."""


def audit(
    inputs: AuditInputs,
    progress: Progress | None = None,
    given: Mapping[str, RowSet] = MappingProxyType({}),
) -> dict[str, Any]:
    """Checks every input, attacks every model, writes and returns audit.json.

    `given` rows, by the names forget, retain, earlier 1, ..., stand for those that `inputs` names.

    Raises InputError before a model is loaded. Interrupted, what was finished is kept beside
    `output` and used by the next call with the same inputs.
    """
    progress = progress or Silent()
    device = resolve_device(inputs.device)
    if inputs.output is not None:
        check_output(inputs, inputs.output)
    if inputs.cache is not None:
        check_cache(Path(inputs.cache))
    checked = checked_models(inputs)
    # The unlearned model's own record, if a run made it.
    policies = text_policies(checked["unlearned"], inputs.chat_template, inputs.long_rows)
    sets = read_sets(inputs, given)
    requests = requests_of(inputs, sets, checked, policies)
    dtypes = {name: resolve_dtype(model, inputs.dtype) for name, model in checked.items()}
    plan, target = planned_here(inputs, requests, checked, policies[-1]), checked["target"]
    tuned = plan.tuned
    requests = [replace(each, case=replace(each.case, tuned=tuned)) for each in requests]
    progress.message(f"audit: {plan.peak / 2**30:.1f} GiB at most, one model at a time (computed)")
    users_secret()  # which hashes need at the end
    digests = {name: model.files.sha256() for name, model in checked.items()}
    told = [line for m in checked.values() for line in said_of_dtype(m, inputs.dtype, device)]
    for line in dict.fromkeys(told):
        progress.message(line)
    partial = Partial(
        None if inputs.output is None else Path(inputs.output),
        None if inputs.cache is None else Path(inputs.cache),
        reveal=inputs.reveal,
    )
    policy = settled(
        policies,
        lambda: load_model(target, dtypes["target"], device),
        target.tokenizer,
        sets["forget"] or (),
        sets["retain"],
        progress.message,
    )
    found: Results = {}
    subjects: dict[ModelName, Subject] = {}
    for name in (n for n in MODELS if n in checked):
        subjects[name] = Subject(
            name,
            checked[name],
            dtypes[name],
            device,
            fitted(policy, checked[name]),
            inputs.batch_size,
            BUDGETS[inputs.budget].tokens,
            subjects.get("target"),
        )
        _attack(subjects[name], requests, inputs, digests, device, partial, progress, found)
    judged = [_judged(request, n, found, inputs) for n, request in enumerate(requests)]
    report = finite(
        {
            "format": FORMAT,
            "expunge": expunge.__version__,
            "versions": {name: version(name) for name in _LIBRARIES},
            "verdict": worst_of([verdict for _, verdict in judged]).to_json(),
            "models": {
                name: {
                    "path": named(model.name),
                    "sha256": digests[name],
                    "dtype": dtypes[name],
                    "tuned_in": "float32" if tuned == "full" else dtypes[name],
                }
                for name, model in checked.items()
            },
            "settings": {
                "budget": {"name": inputs.budget, **asdict(BUDGETS[inputs.budget])},
                "learning_rate": requests[0].case.learning_rate,
                "tuning": tuned,
                "seed": inputs.seed,
                "device": device,
                "reveal": inputs.reveal,
                "text": fitted(policy, checked["unlearned"]).describe(target.tokenizer),
            },
            "rows": {
                name: _described(rows)
                for name, rows in sets.items()
                if rows is not None and not name.startswith("earlier")
            },
            "requests": [entry for entry, _ in judged],
        }
    )
    if inputs.output is not None:
        output = Path(inputs.output)
        text = json.dumps(report, indent=2) + "\n"
        deliver({output: text}, private=[output] if inputs.reveal else ())
        partial.remove()
    return dict(report)


def _attack(
    subject: Subject,
    requests: Sequence[Request],
    inputs: AuditInputs,
    digests: Mapping[ModelName, Mapping[str, str]],
    device: str,
    partial: Partial,
    progress: Progress,
    found: Results,
) -> None:
    """Adds to `found` what every attack finds on one model, what was kept before as it is."""
    total = _UNITS * sum(len(request.attacks) for request in requests)
    done = 0
    for number, request in enumerate(requests):
        for attack in request.attacks:
            facts = _facts(inputs, request, attack, subject, digests, device)
            result = partial.read(facts)
            if result is None:
                bar = _Bar(progress, subject.name, done, total)
                result = partial.write(facts, attack.run(subject, request.case, bar))
            found.setdefault((number, attack.name), {})[subject.name] = result
            done += _UNITS
            progress.phase(subject.name, done, total)
    subject.release()


@dataclass(frozen=True)
class _Bar:
    """Tells how far one attack of a model is, as a part of all of its attacks."""

    progress: Progress
    name: str
    begun: int
    total: int

    def __call__(self, done: int, of: int) -> None:
        self.progress.phase(self.name, self.begun + _UNITS * done // max(1, of), self.total)


def _judged(
    request: Request,
    number: int,
    found: Results,
    inputs: AuditInputs,
) -> tuple[dict[str, Any], Verdict]:
    """One request's entry in audit.json, and its verdict."""
    attacks: dict[str, Any] = {}
    evidence: list[Evidence] = []
    known = known_facts(
        found[number, attack.name]["target"] for attack in request.attacks if attack.kind == "extraction"
    )
    for attack in request.attacks:
        models = found[number, attack.name]
        summary = summarise(attack, models, request.case, known)
        attacks[attack.name] = summary.entry
        evidence += summary.evidence
        if inputs.reveal:
            summary.entry["texts"] = {name: dict(each.texts) for name, each in models.items()}
    kept = kept_share(found[number, "direct"], request.case)
    adapter = request.case.tuned == "lora" and any(attack.tunes for attack in request.attacks)
    verdict = judge_audit(kept, evidence, adapter=adapter)
    case = request.case
    return {
        "forget": {
            **_described(request.rows),
            "documents": len({document_of(row) for row in request.rows}),
        },
        "audited": {
            "rows": len(case.facts),
            "documents": len({document_of(row) for row in case.facts}),
            "members": len(case.members),
            "retain_rows": len(case.retain),
            "nonmembers": len(case.nonmembers),
        },
        "verdict": verdict.to_json(),
        "kept": None if kept is None else kept.to_json(),
        "attacks": attacks,
        "not_run": dict(request.skipped),
    }, verdict


def _described(rows: RowSet) -> dict[str, Any]:
    return {
        "source": named(rows.source),
        "hmac_sha256": data_fingerprint(rows),
        "rows": len(rows),
    }


@cache
def _code() -> str:
    """SHA-256 of this package's modules: what another one of them measured is not read."""
    content = hashlib.sha256()
    root = Path(expunge.__file__).parent
    for path in sorted(root.rglob("*.py")):
        content.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()


def _facts(
    inputs: AuditInputs,
    request: Request,
    attack: Attack,
    subject: Subject,
    digests: Mapping[ModelName, Mapping[str, str]],
    device: str,
) -> dict[str, Any]:
    """All that the result of one attack on one model follows from."""
    case = request.case
    sides: dict[str, Sequence[Row]] = {
        name: getattr(case, name)
        for name in ("facts", "members", "forget", "retain", "tuning", "others", "nonmembers")
    }
    sides |= {f"of {owner}": wordings for owner, wordings in case.paraphrases.items()}
    rows = {name: [astuple(row) for row in side] for name, side in sides.items()}
    return {
        "format": FORMAT,
        "code": _code(),
        "versions": {name: version(name) for name in _LIBRARIES},
        "attack": attack.name,
        "model": subject.name,
        "weights": dict(digests[subject.name]),
        "patched": dict(digests["target"]) if attack.patches else None,
        "rows": hashlib.sha256(repr(rows).encode()).hexdigest(),
        "budget": asdict(case.budget),
        "learning_rate": case.learning_rate,
        "tuning": case.tuned if attack.tunes else None,
        "seed": case.seed,
        "dtype": subject.dtype,
        "device": device,
        "chat_template": subject.policy.chat_template,
        "long_rows": inputs.long_rows,
        "reveal": inputs.reveal,
    }
