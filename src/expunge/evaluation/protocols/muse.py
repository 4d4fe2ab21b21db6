"""MUSE on a model (arXiv 2407.06460): verbatim and knowledge memorisation, and privacy leakage.

Prompts are plain texts without a chat template; `evaluation.muse` has the formulas.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from expunge.data.formats import Role
from expunge.data.rows import Row, RowSet, check_disjoint
from expunge.data.tokenization import TextPolicy, encode_rows, tokenizing
from expunge.errors import InputError
from expunge.evaluation.likelihood import min_k
from expunge.evaluation.memorisation import mean_memorisation, memorisation
from expunge.evaluation.muse import (
    ANSWER_TOKENS,
    CHANCE,
    LOWEST,
    VERBATIM_TOKENS,
    first_answer,
    privleak,
    privleak_auc,
    solved_prompt,
)
from expunge.evaluation.passes import Passes, record_of
from expunge.evaluation.protocols.base import Measure, Protocol, ProtocolScores, check_finite
from expunge.evaluation.protocols.inputs import ProtocolInputs
from expunge.evaluation.score_files import read_protocol_scores
from expunge.evaluation.scorecard import check_prompts_of
from expunge.evaluation.scores import rouge_f1
from expunge.models.loading import CheckedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "muse"
SIDES: tuple[Role, ...] = ("forget", "retain")
MEASURES: Mapping[str, Measure] = {
    "verbmem": Measure("VerbMem", "low"),
    "knowmem_forget": Measure("KnowMem forget", "low"),
    "knowmem_retain": Measure("KnowMem retain", "high"),
    "privleak": Measure("PrivLeak", "0", low=-100.0, high=float("inf"), form=".1f"),
    "privleak_auc": Measure("AUC of min-40%", "0.5"),
    "forget_extraction_strength": Measure("forget extraction strength", "low"),
    "forget_exact_memorisation": Measure("forget exact memorisation", "low"),
}


@dataclass(frozen=True, repr=False)
class Material:
    """What a model is measured on."""

    forget: RowSet
    """Prompts of the forget set with the true continuation, cut to what is compared."""
    questions: Mapping[Role, Sequence[Row]]
    """By side, each question after the solved ones."""
    members: RowSet | None
    nonmembers: RowSet | None
    retrained: float | None
    """The retrained model's AUC."""
    retain: RowSet | None = None
    """None: no form of the text is to be settled."""


def read(inputs: ProtocolInputs, model: CheckedModel, policies: Sequence[TextPolicy]) -> Material:
    """Reads every set that is given, and checks that it fits. Raises InputError."""
    _check_pairs(inputs)
    forget = inputs.read(inputs.forget, "forget")
    cut = tuple(_cut(row, model.tokenizer) for row in forget)
    questions = {side: found for side in SIDES if (found := _questions(inputs, side))}
    texts = inputs.read_sets("members", "nonmembers")
    members, nonmembers = texts.get("members"), texts.get("nonmembers")
    for policy in policies:
        for rows in (cut, *questions.values()):
            check_prompts_of(rows, model.tokenizer, policy)
        for texts_of in (members, nonmembers):
            encode_rows(texts_of or (), model.tokenizer, policy, eos=False)
    if members is not None and nonmembers is not None:
        check_disjoint(members, nonmembers)
    retrained = None
    if inputs.oracle_scores is not None:
        retrained = _retrained(inputs.oracle_scores)
    return Material(replace(forget, rows=cut), questions, members, nonmembers, retrained)


def _check_pairs(inputs: ProtocolInputs) -> None:
    pairs = (
        ("forget_questions", "forget_solved", "the solved questions that stand before each"),
        ("retain_questions", "retain_solved", "the solved questions that stand before each"),
        ("members", "nonmembers", "held-out text to compare with"),
        ("oracle_scores", "nonmembers", "held-out text; PrivLeak alone is relative to an oracle"),
    )
    for name, other, what in pairs:
        if getattr(inputs, name) is not None and getattr(inputs, other) is None:
            raise InputError(f"--{name}: needs --{other} with {what}; add it")
    for name, other in (("nonmembers", "members"), *((b, a) for a, b, _ in pairs[:2])):
        if getattr(inputs, name) is not None and getattr(inputs, other) is None:
            raise InputError(f"--{name}: goes with --{other}; add it, or leave both out")


def _cut(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """The row with as much of its continuation as new tokens are written."""
    with tokenizing(f"row {row.id!r}"):
        ids = tokenizer(row.output, add_special_tokens=False)["input_ids"]
    if len(ids) <= VERBATIM_TOKENS:
        return row
    text = tokenizer.decode(ids[:VERBATIM_TOKENS], skip_special_tokens=True)
    return replace(row, output=str(text))


def _questions(inputs: ProtocolInputs, side: Role) -> list[Row]:
    asked, solved = (getattr(inputs, f"{side}_{name}") for name in ("questions", "solved"))
    if asked is None:
        return []
    shown = [(row.input, row.output) for row in inputs.read(solved, side)]
    return [
        replace(row, input=solved_prompt(shown, row.input), joiner="")
        for row in inputs.read(asked, side)
    ]


def _retrained(source: str) -> float:
    auc = read_protocol_scores(source, NAME, MEASURES).scores["privleak_auc"]
    if not auc:
        raise InputError(
            f"--oracle-scores {source}: has no AUC of min-40%, or one of 0; measure the oracle with"
            " --members and --nonmembers"
        )
    return auc


def measure(material: Material, passes: Passes) -> ProtocolScores:
    """Generates and reads every set. Raises RunError for a model whose losses are no numbers."""
    records = _records(passes, "forget", "verbatim", material.forget.rows, VERBATIM_TOKENS)
    scores: dict[str, float | None] = dict.fromkeys(MEASURES)
    scores["verbmem"] = statistics.fmean(record["score"] for record in records)
    scores |= {f"forget_{part}": value for part, value in mean_memorisation(records).items()}
    for side, rows in material.questions.items():
        found = _records(passes, side, "questions", rows, ANSWER_TOKENS)
        scores[f"knowmem_{side}"] = statistics.fmean(record["score"] for record in found)
        records += found
    if material.members is not None and material.nonmembers is not None:
        members = _lowest(passes, material.members, "members")
        auc = privleak_auc(members, _lowest(passes, material.nonmembers, "non-members"))
        scores["privleak_auc"] = auc
        scores["privleak"] = privleak(auc, material.retrained or CHANCE)
    details = {
        "rows": {
            "forget": len(material.forget),
            **{k: len(v) for k, v in material.questions.items()},
        },
        "retrained_auc": material.retrained,
    }
    return ProtocolScores(NAME, scores, details=details, records=records)


def _records(
    passes: Passes, side: Role, name: str, rows: Sequence[Row], longest: int
) -> list[dict[str, Any]]:
    """A record a row, with ROUGE-L F1; of questions what is written before the next one counts."""
    split = f"{side} {name}"
    records = []
    for row, said in zip(rows, passes.written(rows, split, longest), strict=True):
        score = rouge_f1(row.output, said.text if name == "verbatim" else first_answer(said.text))
        records.append(record_of(row, split, score, said, memorisation(said.right)))
    return records


def _lowest(passes: Passes, rows: RowSet, name: str) -> list[float]:
    """min-40% of each text, in nats a token."""
    examples = encode_rows(rows, passes.tokenizer, passes.policy, eos=False)
    log_probs = passes.log_probs(examples, name)
    found = {row.id: min_k(log_probs[row.id], LOWEST) for row in rows}
    check_finite(found)
    return list(found.values())


PROTOCOL = Protocol(name=NAME, measures=MEASURES, read=read, measure=measure)
