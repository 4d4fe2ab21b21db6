"""`expunge evaluate`: a model's scorecard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.cli.console import progress_on_stderr
from expunge.cli.options import Printed, parse, print_json, take_option, yaml_fields
from expunge.evaluation.measuring import measure
from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.protocols.base import SEMEVAL, ProtocolScores
from expunge.evaluation.protocols.catalog import PROTOCOLS
from expunge.evaluation.protocols.inputs import OWN, ProtocolInputs
from expunge.evaluation.protocols.measuring import measure_by_protocol
from expunge.evaluation.scorecard import Scorecard
from expunge.evaluation.sentences import scores_sentence
from expunge.reporting.tables import protocol_table, scorecard_table, table_console
from expunge.terminal import speaks

_RECALLED = (
    "forget", "retain", "nonmembers", "mmlu", "columns", "joiner", "long_rows",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluate(Printed, ProtocolInputs):
    """expunge evaluate MODEL --forget F --retain R [--nonmembers N] [--mmlu DIR]

    Measures regurgitation, knowledge, membership inference and utility by the protocol of
    SemEval-2025 Task 4, or what another benchmark measures.

    Examples:
      expunge evaluate out
      expunge evaluate out --forget f.jsonl --retain r.jsonl --nonmembers n.jsonl --output s.json
      expunge evaluate out --protocol tofu --forget forget05_perturbed.jsonl --retain r.jsonl
    """


def main(arguments: Sequence[str]) -> int:
    """Parses, measures, prints."""
    settings = parse(Evaluate, arguments, "expunge evaluate", recalls=_recalled(arguments))
    with progress_on_stderr() as progress:
        if settings.protocol == SEMEVAL:
            card: Scorecard | ProtocolScores = measure(settings, progress.phase, progress.message)
        else:
            card = measure_by_protocol(settings, progress.phase, progress.message)
    if speaks():
        _show(card, settings)
    return 0


def _recalled(arguments: Sequence[str]) -> Sequence[str]:
    """Options that a run directory knows; of another protocol those that it takes."""
    rest, config = take_option(arguments, "--config")
    said = take_option(rest, "--protocol")[1]
    if said is None and config is not None and Path(config).is_file():
        said = yaml_fields(Path(config)).get("protocol")
    if said in (None, SEMEVAL):
        return _RECALLED
    kept = {"retain", "columns", "joiner"}.intersection(OWN.get(str(said), ()))
    return [name for name in _RECALLED if name in kept or name not in OWN[SEMEVAL]]


def _show(card: Scorecard | ProtocolScores, settings: Evaluate) -> None:
    if settings.json:
        print_json(card.to_json())
        return
    console = table_console()
    name, title = Path(settings.model).name, f"Scorecard of {settings.model}"
    if isinstance(card, ProtocolScores):
        console.print(protocol_table(PROTOCOLS[card.protocol], {name: card}, title))
        return
    console.print(scorecard_table({name: card}, title))
    if cut := card.details.get("harness", {}).get("cut"):
        context, texts = card.details["text"]["context"], card.details["harness"]["texts"]
        console.print(
            f"harness: {cut} of {texts} texts exceed the {context} tokens and lost their start"
        )
    for finding in of_scores(card):
        console.print(scores_sentence(finding))
