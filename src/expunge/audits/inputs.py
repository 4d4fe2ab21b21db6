"""What an audit is told, and every check of it before a model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from expunge.audits.attacks.depth import not_alike
from expunge.audits.base import Attack, Case, ModelName, Tuned
from expunge.audits.budgets import BUDGETS, BudgetName
from expunge.audits.catalog import ATTACKS
from expunge.audits.facts import drawn
from expunge.audits.memory import PlannedAudit, Sizes, plan_audit
from expunge.audits.paraphrases import read_paraphrases
from expunge.audits.subject import BEYOND
from expunge.audits.tuning import default_learning_rate, free_memory
from expunge.data.formats import Role
from expunge.data.rows import Row, RowSet, by_document, check_disjoint, documents
from expunge.data.tokenization import TextPolicy, encode_rows, prompt_ids
from expunge.disk import check_file_output
from expunge.errors import InputError, check_seed
from expunge.evaluation.outcomes import FEW
from expunge.models.asking import Asking
from expunge.models.devices import resolve_device
from expunge.models.loading import CheckedModel, Dtype, check_model, resolve_dtype
from expunge.models.text_forms import text_policies, vocabulary_of

FORMAT = "expunge-audit/1"
"""Of audit.json."""


RECALLED = (
    "original", "forget", "retain", "nonmembers", "oracle", "paraphrases", "columns", "joiner",
    "long_rows",
)  # fmt: skip
"""Fields that a run directory knows."""


@dataclass(frozen=True)
class AuditInputs(Asking):
    """What is audited, against which models and rows, by which attacks."""

    model: str
    """The unlearned model: directory or hub id. It is read as it is saved."""
    original: str
    """The target: the model before unlearning. Every attack must work on it first."""
    forget: str
    """Rows that were to be removed."""
    retain: str
    """Rows that were to stay."""
    oracle: str | None = None
    """A model trained on the retain set only. By the same recipe; without it the floor is 0."""
    nonmembers: str | None = None
    """Non-members of the forget set's kind. Membership inference needs them."""
    paraphrases: str | None = None
    """Other wordings of forget rows. A file with `of` (the row's id), `input` and `output`."""
    benign: str | None = None
    """Text that benign relearning tunes on; null: retain rows."""
    earlier: tuple[str, ...] = ()
    """Forget files of earlier requests, which are audited again."""
    attacks: tuple[str, ...] = ()
    """Attacks to run, with commas or spaces between: direct, paraphrase, sample, verbatim,
    membership, ablate, trigger, latent, depth, quantize, relearn or benign. None: all that there is
    material for."""
    budget: BudgetName = "quick"
    """How many rows, steps and samples."""
    learning_rate: float | None = None
    """Learning rate of attacks by tuning. They also try others around it. null: 5e-4, times 256 /
    width above width 256. LoRA takes ten times as much."""
    tuning: Literal["auto", "full", "lora"] = "auto"
    """Attacks by tuning train every weight (full, 16 bytes a parameter) or an adapter (lora); auto:
    full if the free memory holds it."""
    output: str | None = None
    """Write audit.json here. Unfinished, an audit goes on from OUTPUT.partial."""
    cache: str | None = None
    """Directory that keeps what was found on target and oracle, for audits of the same models, rows
    and settings. It holds scores by row id and no text."""
    reveal: bool = False
    """Add the nearest generated text. It can hold forgotten text."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        rate = self.learning_rate
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise InputError(f"--learning-rate {rate:g}: must be a number above 0")
        if self.reveal and self.output is None:
            raise InputError("--reveal: adds text to audit.json; give --output FILE")
        if self.reveal and self.cache is not None:
            raise InputError("--cache: keeps no text, which --reveal asks for; leave one of them out")
        names = self.attack_names()
        if self.attacks and not names:
            raise InputError(f"--attacks: names none; choose from {', '.join(ATTACKS)}")
        unknown = [name for name in names if name not in ATTACKS]
        if unknown:
            raise InputError(f"--attacks {unknown[0]}: unknown; choose from {', '.join(ATTACKS)}")
        if "membership" in names and self.nonmembers is None:
            raise InputError("--attacks membership: needs non-members; give --nonmembers")
        if self.benign is not None and names and "benign" not in names:
            raise InputError("--benign: is for the attack benign, which --attacks leaves out; add it")
        if self.tuning != "auto" and names and not any(ATTACKS[name].tunes for name in names):
            raise InputError(
                "--tuning: is for the attacks relearn and benign, which --attacks leaves out; add one"
            )
        if self.paraphrases is not None and names and "paraphrase" not in names:
            raise InputError(
                "--paraphrases: is for the attack paraphrase, which --attacks leaves out; add it"
            )

    def attack_names(self) -> list[str]:
        """What --attacks says, commas and spaces alike."""
        return [name for given in self.attacks for name in given.split(",") if name]


@dataclass(frozen=True)
class Request:
    """One forget file with what is audited of it."""

    rows: RowSet
    case: Case
    attacks: Sequence[Attack]
    skipped: Mapping[str, str]
    """Attacks that were not run, and why."""


def checked_models(inputs: AuditInputs) -> dict[ModelName, CheckedModel]:
    """Target, unlearned model and oracle, checked without reading weights.

    Raises InputError, also for models of two families and for one model given twice.
    """
    names: dict[ModelName, str | None] = {
        "target": inputs.original,
        "unlearned": inputs.model,
        "oracle": inputs.oracle,
    }
    checked: dict[ModelName, CheckedModel] = {
        name: check_model(given, trust_remote_code=inputs.trust_remote_code)
        for name, given in names.items()
        if given is not None
    }
    target = checked["target"]
    for name, model in checked.items():
        if model.tokenizer.get_vocab() != target.tokenizer.get_vocab():
            option = "--oracle" if name == "oracle" else "MODEL"
            raise InputError(
                f"{option} {model.name}: its tokenizer is not that of --original {target.name};"
                " give models of one family"
            )
    shards = {name: model.files.sha256() for name, model in checked.items()}
    for name, option in (("unlearned", "MODEL"), ("oracle", "--oracle")):
        if name in shards and _weights(shards[name]) == _weights(shards["target"]):
            raise InputError(
                f"{option} {checked[name].name}: has the same weights as --original"
                f" {target.name}; give the model that was made from it"
            )
    return checked


def _weights(digests: Mapping[str, str]) -> set[str]:
    return {digest for name, digest in digests.items() if name.endswith(".safetensors")}


def planned(
    inputs: AuditInputs,
    requests: Sequence[Request],
    checked: CheckedModel,
    policy: TextPolicy,
    dtype: Dtype,
    device_type: str,
    free: int,
) -> PlannedAudit:
    """What attacks by tuning train in every model, and the memory of the audit."""
    ways: tuple[Tuned, ...] = ("full", "lora") if inputs.tuning == "auto" else (inputs.tuning,)
    sizes = _sizes(inputs, requests, checked, policy)
    return plan_audit(checked, dtype, device_type, sizes, ways, free)


def planned_here(
    inputs: AuditInputs,
    requests: Sequence[Request],
    checked: Mapping[ModelName, CheckedModel],
    policy: TextPolicy,
    mend: str = "",
) -> PlannedAudit:
    """The same with the memory that is free here.

    Raises InputError where the audit does not fit, with the options that mend it after `mend`.
    """
    device, target = resolve_device(inputs.device), checked["target"]
    free, kind = free_memory(device), torch.device(device).type
    dtypes = [resolve_dtype(model, inputs.dtype) for model in checked.values()]
    widest = max(dtypes, key=lambda name: getattr(torch, name).itemsize)
    plan = planned(inputs, requests, target, policy, widest, kind, free)
    if not plan.fits:
        worst = max(plan.phases, key=lambda phase: phase.bytes)
        option = f"--tuning {plan.tuned}: " if worst.name == "tune" and not mend else ""
        raise InputError(
            f"{option}an audit of {target.name} takes {plan.peak / 2**30:.1f} GiB to {worst.name},"
            f" {free / 2**30:.1f} GiB are free on {device}; {mend}{plan.mend}"
        )
    return plan


def _sizes(
    inputs: AuditInputs, requests: Sequence[Request], checked: CheckedModel, policy: TextPolicy
) -> Sizes:
    """The longest rows that are asked and tuned on."""

    def longest(rows: Iterable[Row]) -> int:
        examples = encode_rows(list(rows), checked.tokenizer, policy, eos=True)
        return max(map(len, examples), default=0)

    asked, tuned = 0, 0
    for request in requests:
        case = request.case
        asked = max(asked, longest((*case.facts, *case.members, *case.retain, *case.nonmembers)))
        if any(attack.tunes for attack in request.attacks):
            few = len(by_document(case.facts)) < 2
            tuned = max(tuned, longest((*case.facts, *case.tuning, *(case.others if few else ()))))
    return Sizes(asked + BEYOND, tuned, inputs.batch_size, BUDGETS[inputs.budget])


def read_sets(inputs: AuditInputs, given: Mapping[str, RowSet]) -> dict[str, RowSet | None]:
    """Every row set by the option that names it; earlier requests are "earlier 1", ...

    `given` rows stand for those that `inputs` names.
    """
    sources: dict[str, tuple[str | None, Role]] = {
        "forget": (inputs.forget, "forget"),
        "retain": (inputs.retain, "retain"),
        "nonmembers": (inputs.nonmembers, "nonmembers"),
        "benign": (inputs.benign, "retain"),
    }
    for number, earlier in enumerate(inputs.earlier, 1):
        sources[f"earlier {number}"] = (earlier, "forget")
    sets = {
        name: None if source is None else given.get(name) or inputs.read(source, role)
        for name, (source, role) in sources.items()
    }
    for name, rows in sets.items():
        if rows is None or name not in ("forget", *(n for n in sets if n.startswith("earlier"))):
            continue
        for other in ("retain", "nonmembers", "benign"):
            against = sets[other]
            if against is not None:
                check_disjoint(rows, against)
    return sets


def requests_of(
    inputs: AuditInputs,
    sets: Mapping[str, RowSet | None],
    checked: Mapping[ModelName, CheckedModel],
    policies: Sequence[TextPolicy],
) -> list[Request]:
    """Every request's rows drawn to the budget, checked against every model, with its attacks."""
    budget = BUDGETS[inputs.budget]
    retain, nonmembers, benign = sets["retain"], sets["nonmembers"], sets["benign"]
    assert retain is not None
    asked = drawn(retain.rows, budget.retain, inputs.seed)
    never_seen = [] if nonmembers is None else documents(nonmembers)
    rate = inputs.learning_rate or default_learning_rate(checked["target"].layout.width)
    found = []
    for name, rows in sets.items():
        if rows is None or (name != "forget" and not name.startswith("earlier")):
            continue
        few = len(by_document(rows.rows)) <= FEW
        facts = drawn(rows.rows, None if few else budget.facts, inputs.seed)
        most = None if few else budget.nonmembers
        paraphrases: Mapping[str, Sequence[Row]] = {}
        if inputs.paraphrases is not None:
            paraphrases = read_paraphrases(inputs.paraphrases, rows, required=name == "forget")
        case = Case(
            facts=facts,
            members=drawn(documents(rows), most, inputs.seed),
            forget=rows.rows,
            retain=asked,
            tuning=asked if benign is None else benign.rows,
            others=retain.rows,
            nonmembers=drawn(never_seen, most, inputs.seed),
            paraphrases=paraphrases,
            budget=budget,
            seed=inputs.seed,
            learning_rate=rate,
        )
        attacks, skipped = _chosen(inputs, case, checked)
        found.append(Request(rows, case, attacks, skipped))
        for model in checked.values():
            for policy in policies:
                _check_rows(case, model, fitted(policy, model))
    return found


def fitted(policy: TextPolicy, model: CheckedModel) -> TextPolicy:
    """The policy with a model's own limits."""
    return replace(policy, context=model.context, vocabulary=vocabulary_of(model.config))


def check_audit(inputs: AuditInputs, target: CheckedModel) -> None:
    """All that rows and oracle may be refused for; the target stands for a result that is yet to come.

    Raises InputError.
    """
    models: dict[ModelName, CheckedModel] = {"target": target, "unlearned": target}
    if inputs.oracle is not None:
        models["oracle"] = check_model(inputs.oracle, trust_remote_code=inputs.trust_remote_code)
    policies = text_policies(target, inputs.chat_template, inputs.long_rows)
    requests = requests_of(inputs, read_sets(inputs, {}), models, policies)
    alone = "give --no-audit, and audit the result by itself: "
    planned_here(inputs, requests, models, policies[-1], alone)


def _chosen(
    inputs: AuditInputs, case: Case, checked: Mapping[ModelName, CheckedModel]
) -> tuple[list[Attack], dict[str, str]]:
    """The attacks to run, direct questions always among them, and why others are not."""
    wanted = inputs.attack_names()
    questions = any(row.kind == "qa" for row in case.facts)
    whys = {
        "membership": None if case.nonmembers else "no non-members were given (--nonmembers)",
        "latent": None if questions else "no forget row is a question",
        "depth": not_alike(checked),
    }
    impossible = {name: why for name, why in whys.items() if why is not None}
    for name in wanted:
        if name in impossible:
            raise InputError(f"--attacks {name}: {impossible[name]}; leave it out")
    chosen, skipped = [], {}
    for name, attack in ATTACKS.items():
        if name in impossible:
            skipped[name] = impossible[name]
        elif wanted and name not in (*wanted, "direct"):
            skipped[name] = "--attacks leaves it out"
        else:
            chosen.append(attack)
    return chosen, skipped


def _check_rows(case: Case, model: CheckedModel, policy: TextPolicy) -> None:
    """Raises InputError for rows that do not fit the model."""
    for row in (*case.facts, *case.retain):
        length = len(prompt_ids(row, model.tokenizer, policy))
        if length >= policy.context:
            raise InputError(
                f"row {row.id!r}: its prompt has {length} tokens and fills the context of"
                f" {policy.context} of {model.name}; shorten it"
            )
    encode_rows(
        [*case.facts, *case.members, *case.retain, *case.nonmembers],
        model.tokenizer,
        policy,
        eos=True,
    )
    encode_rows(case.tuning, model.tokenizer, policy, eos=True)


def check_output(inputs: AuditInputs, output: str) -> None:
    """Raises InputError where audit.json cannot be written, or would replace a row file."""
    names = (
        "model", "original", "oracle", "forget", "retain", "nonmembers", "paraphrases", "benign",
    )  # fmt: skip
    read: dict[str, str | None] = {name: getattr(inputs, name) for name in names}
    read |= {f"earlier {source}": source for source in inputs.earlier}
    check_file_output("output", Path(output), read, _is_audit)


def _is_audit(text: str) -> bool:
    return bool(json.loads(text)["format"] == FORMAT)
