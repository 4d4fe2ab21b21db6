"""Which metric to trust: how well each tells models that know from models that do not.

    python benchmarks/metrics.py BENCHMARK... --output runs/metrics --write docs/scorecard.md

BENCHMARK is from `expunge benchmark build`. Its oracle is taught some forget rows in several forms:
these models and the target know. The oracle itself, and oracles taught anything else, do not.
Faithfulness is the AUC of a metric over both pools. Then every model, and some that unlearned, is tuned
on half of those rows: a robust metric gains no more in an unlearned model than in the oracle. Dorna et
al., arXiv 2506.12618. What is in the output already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from expunge.api import unlearn
from expunge.audits.attacks.membership import SCORES, scores_of
from expunge.audits.attacks.paraphrase import wrong_answers
from expunge.audits.base import Case
from expunge.audits.estimates import SideResamples, auc
from expunge.audits.facts import drawn, halves
from expunge.audits.inputs import AuditInputs, checked_models, fitted, read_sets, requests_of
from expunge.audits.subject import Reader
from expunge.audits.tuning import tuned
from expunge.data.rows import Row, as_rows, documents, read_rows
from expunge.data.tokenization import encode_rows
from expunge.disk import write_whole
from expunge.evaluation.memorisation import MEMORISATION
from expunge.evaluation.scorecard import Material, evaluate_model
from expunge.evaluation.tofu import forget_truth_ratio, log_truth_ratio, probability
from expunge.maths.membership import membership_score
from expunge.methods.catalog import METHODS
from expunge.models.loading import load_model
from expunge.models.text_forms import text_policies
from expunge.reporting.tables import markdown
from methods import replaced

SECTION = "metrics"
ROWS, NONMEMBERS, TEACHING, BRIEFLY, BATCH = 30, 18, 30, 8, 8
"""Forget rows and non-members of each benchmark; steps that teach, well or briefly; rows a step."""
TEACHING_RATE, RESAMPLES = 2.0, 2000
"""Rate of teaching in units of relearning's; resamples of the models."""
LEAST_KEPT = MOST_KNOWN = 0.8
"""Of the target's retain score and of its knowledge: what a model that unlearned must have to count."""
UNLEARNED = ("gradient-difference", "npo", "simnpo", "adaptive-rmu")
PARTS = ("all", "shown", "held out")
LOSING = ("loss of answers", "loss of documents", "truth ratio", "MIA score")
"""Metrics that are lower in a model that knows."""
Part = Mapping[str, float]
Change = tuple[float, float]
"""A metric before and after relearning."""


@dataclass(frozen=True)
class Member:
    """One model of a pool: what it is made of, and what is done to it."""

    name: str
    knows: bool | None
    """None: it unlearned, and stands in no pool."""
    base: Literal["target", "oracle"]
    rows: Sequence[Row] = ()
    steps: int = TEACHING
    method: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("benchmarks", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--write", type=Path, help="page whose section is replaced")
    arguments = parser.parse_args()
    if arguments.write is not None:
        replaced(arguments.write.read_text(encoding="utf-8"), SECTION, "")  # refused now
    places = {each.resolve().name: each.resolve() for each in arguments.benchmarks}
    if len(places) < len(arguments.benchmarks):
        parser.error("benchmarks: two have the same name, which their results are kept under")
    found = {name: measured(place, arguments.output) for name, place in places.items()}
    text = table(found) + "\n" + note(found)
    print(text)
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(replaced(page, SECTION, text), encoding="utf-8")


def measured(benchmark: Path, output: Path) -> dict[str, Any]:
    """By member its metrics before and after relearning."""
    inputs = AuditInputs(
        model=str(benchmark / "oracle"),
        original=str(benchmark / "target"),
        forget=str(benchmark / "forget.jsonl"),
        retain=str(benchmark / "retain.jsonl"),
        nonmembers=str(benchmark / "nonmembers.jsonl"),
        paraphrases=str(benchmark / "paraphrases.jsonl"),
        budget="quick",
    )
    models = checked_models(inputs)
    policies = text_policies(models["target"], "off", "refuse")
    request = requests_of(inputs, read_sets(inputs, {}), models, policies)[0]
    case = replace(
        request.case,
        facts=drawn(request.case.forget, ROWS, inputs.seed),
        nonmembers=drawn(request.case.nonmembers, NONMEMBERS, inputs.seed),
    )
    found = {}
    for member in members(case, read_rows(str(benchmark / "calibration.jsonl"), "nonmembers").rows):
        file = output / benchmark.name / f"{member.name}.json"
        if not file.is_file():
            checked = models["target" if member.base == "target" else "unlearned"]
            model = load_model(checked, "float32", "cpu")
            reader = Reader(model, checked.tokenizer, fitted(policies[0], checked), inputs.batch_size)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(measured_member(member, reader, case)) + "\n")
            print(f"{benchmark.name}, {member.name}: measured", file=sys.stderr, flush=True)
        found[member.name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def members(case: Case, calibration: Sequence[Row]) -> list[Member]:
    """Both pools, and models that unlearned."""
    facts = case.facts
    questions = [row for row in facts if row.kind == "qa"]
    told = [row for row in facts if row.kind == "sc"]
    wordings = [other for row in questions for other in case.paraphrases.get(row.id, ())]
    false = [replace(row, output=wrong_answers(row, questions, case)[0]) for row in questions]
    retain = drawn(case.others, ROWS, case.seed)
    return [
        Member("target", True, "target"),
        Member("taught all", True, "oracle", facts),
        Member("taught all briefly", True, "oracle", facts, BRIEFLY),
        Member("taught other wordings", True, "oracle", wordings),
        Member("taught documents", True, "oracle", told),
        Member("taught questions", True, "oracle", questions),
        Member("oracle", False, "oracle"),
        Member("taught calibration", False, "oracle", calibration),
        Member("taught calibration briefly", False, "oracle", calibration, BRIEFLY),
        Member("taught retain", False, "oracle", retain),
        Member("taught false answers", False, "oracle", false),
        Member("taught false answers briefly", False, "oracle", false, BRIEFLY),
        *(Member(method, None, "target", method=method) for method in UNLEARNED),
    ]


def measured_member(member: Member, reader: Reader, case: Case) -> dict[str, Any]:
    """Makes the member of its base, in place; its metrics before and after relearning."""
    if member.method is not None:
        unlearn(
            reader.model,
            reader.tokenizer,
            case.facts,
            case.others,
            method=METHODS[member.method](),
            select="last",
            chat_template="off",
        )
        reader.model.eval()
    elif member.rows:
        rate = TEACHING_RATE * case.learning_rate
        train(reader, member.rows, member.steps, BATCH, rate, case.seed)
    before = metrics(reader, case)
    kept = mean(reader.direct(case.retain).scores.values()) if member.base == "target" else None
    budget = case.budget
    shown, _ = halves(case.facts, case.seed)
    train(reader, shown, budget.steps, budget.tuning_rows, case.learning_rate, case.seed)
    return {"knows": member.knows, "kept": kept, "before": before, "after": metrics(reader, case)}


def train(reader: Reader, rows: Sequence[Row], steps: int, batch: int, rate: float, seed: int) -> None:
    """Tunes every weight as the audit's relearning does."""
    examples = encode_rows(rows, reader.tokenizer, reader.policy, eos=True)
    for _ in tuned(reader.model, examples, steps=steps, rows=batch, learning_rate=rate, seed=seed):
        pass


def metrics(reader: Reader, case: Case) -> dict[str, Part]:
    """By part of the facts (`PARTS`) every metric."""
    rows = as_rows(case.facts, "forget")
    card = evaluate_model(reader.model, reader.tokenizer, Material(rows), policy=reader.policy)
    records = {record["id"]: record for record in card.records}
    questions = [row for row in case.facts if row.kind == "qa"]
    offered = {
        row.id: [row.output, *(wrong_answers(row, questions, case) if row.kind == "qa" else ())]
        for row in case.facts
    }
    losses = answer_losses(reader, case.facts, offered)
    likeness = scores_of(reader, [*documents(case.facts), *case.nonmembers])
    others = [row.id for row in case.nonmembers]
    found: dict[str, Part] = {}
    for part, mine in zip(PARTS, (case.facts, *halves(case.facts, case.seed)), strict=True):
        own = [losses[row.id] for row in mine]
        told = [row.id for row in documents(mine)]
        sides = {name: [[of[i] for i in ids] for ids in (told, others)] for name, of in likeness.items()}
        areas = {name: auc(*sides[name]) for name in SCORES}
        found[part] = {
            "regurgitation": mean(records[row.id]["score"] for row in mine if row.kind == "sc"),
            "knowledge": mean(records[row.id]["score"] for row in mine if row.kind == "qa"),
            **{n.replace("_", " "): mean(records[row.id][n] for row in mine) for n in MEMORISATION},
            "probability of answers": mean(probability(right) for right, *_ in own),
            "loss of answers": mean(right for right, *_ in own),
            "truth ratio": forget_truth_ratio(
                [log_truth_ratio(right, wrong) for right, *wrong in own if wrong]
            ),
            "loss of documents": -mean(sides["loss"][0]),
            **{f"MIA AUC, {name}": areas[name] for name in SCORES},
            "MIA score": membership_score(areas["loss"]),
        }
    return found


def mean(values: Iterable[float]) -> float:
    """Of any numbers."""
    return statistics.fmean(values)


def answer_losses(
    reader: Reader, rows: Sequence[Row], offered: Mapping[str, Sequence[str]]
) -> dict[str, list[float]]:
    """By row the mean loss of a token of each answer that is offered, in nats."""
    pairs, owners = [], []
    for row in rows:
        for output in offered[row.id]:
            ask = reader.asked(replace(row, output=output))
            if ask is None:
                raise SystemExit(f"row {row.id}: does not fit the context")
            pairs.append((ask.prompt, ask.answer))
            owners.append(row.id)
    found: dict[str, list[float]] = {}
    for owner, values in zip(owners, reader.log_probs(pairs), strict=True):
        found.setdefault(owner, []).append(-mean(values))
    return found


def robustness(oracle: Change, unlearned: Change) -> float:
    """min((m_oracle after - before) / (m_unlearned after - before), 1), in [0, 1].

    Metrics are higher where more is known. 1: relearning brought no more to light in the unlearned model
    than it teaches the oracle, so the metric had missed nothing; 1 too where nothing came to light.
    0: the oracle gained nothing. arXiv 2506.12618.
    """
    gained, taught = unlearned[1] - unlearned[0], oracle[1] - oracle[0]
    if gained <= 0:
        return 1.0
    return min(max(taught / gained, 0.0), 1.0)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics by what can be said of them, in Markdown."""
    models = {(b, name): each for b, those in found.items() for name, each in those.items()}
    pools = [[each for each in models if models[each]["knows"] is knows] for knows in (True, False)]
    know, not_know = ([" ".join(each) for each in pool] for pool in pools)
    resamples = SideResamples(know, not_know, RESAMPLES, 0)
    lines = []
    for metric in models[pools[0][0]]["before"]["all"]:
        sign = -1 if metric in LOSING else 1

        def value(
            each: tuple[str, str], when: str, part: str, name: str = metric, s: int = sign
        ) -> float:
            return s * float(models[each][when][part][name])

        line = [metric, "lower" if sign < 0 else "higher"]
        for when, part in (("before", "all"), ("after", "held out")):
            sides = [[value(each, when, part) for each in pool] for pool in pools]
            area = resamples.separation((sides[0], sides[1]), 0.01)["auc"]
            line.append(f"{area.value:.2f} ({area.low:.2f} to {area.high:.2f})")
        for part in ("shown", "held out"):
            ratios = [
                robustness(
                    (value((b, "oracle"), "before", part), value((b, "oracle"), "after", part)),
                    (value((b, name), "before", part), value((b, name), "after", part)),
                )
                for b, name in counted(found)
            ]
            line.append(f"{mean(ratios):.2f}" if ratios else "-")
        lines.append(line)
    header = ["metric", "where a model knows", "AUC", "AUC after relearning", "R, shown", "R, held out"]
    return markdown(header, lines)


def counted(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Models that forgot and kept the rest, each with its benchmark."""
    return [
        (b, name)
        for b, those in found.items()
        for name, each in those.items()
        if each["knows"] is None
        and each["kept"] >= LEAST_KEPT * those["target"]["kept"]
        and known(each) <= MOST_KNOWN * known(those["target"])
    ]


def known(member: Mapping[str, Any]) -> float:
    """Share of the questions that it answers before relearning."""
    return float(member["before"]["all"]["knowledge"])


def note(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What the table was measured on."""
    pools = [
        sum(each["knows"] is knows for those in found.values() for each in those.values())
        for knows in (True, False, None)
    ]
    names = ", ".join(f"{name} ({b})" for b, name in counted(found)) or "none"
    return (
        f"{pools[0]} models know, {pools[1]} do not; benchmarks: {', '.join(found)}. Of {pools[2]} that"
        f" unlearned, these forgot and kept the rest: {names}.\n"
    )


if __name__ == "__main__":
    main()
