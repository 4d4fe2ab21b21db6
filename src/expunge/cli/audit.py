"""`expunge audit`: attacks that try to get forgotten content back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.audits.auditing import audit
from expunge.audits.inputs import RECALLED, AuditInputs
from expunge.cli.console import progress_on_stderr
from expunge.cli.options import Printed, parse, print_json
from expunge.processes import check_alone
from expunge.reporting.tables import audit_table, table_console

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Audit(Printed, AuditInputs):
    """expunge audit MODEL --original TARGET --forget F --retain R [--oracle O]

    MODEL alone is enough if it is a run directory: the rest is what it was made of.

    Tries to get forgotten content back: relearning, quantisation, sampling, paraphrases, prefixes,
    membership inference, ablation, probes. Each attack runs on the target, the unlearned model and the
    oracle alike and claims nothing if it does not work on the target. Prints a verdict and a sentence an
    attack.

    Examples:
      expunge audit out
      expunge audit out --original model --forget f.jsonl --retain r.jsonl --oracle o
      expunge audit out --attacks relearn,quantize --output audit.json
    """


def main(arguments: Sequence[str]) -> int:
    """Parses, audits, prints."""
    settings = parse(Audit, arguments, "expunge audit", recalls=RECALLED)
    check_alone("audit")
    with progress_on_stderr() as progress:
        report = audit(settings, progress)
    if settings.json:
        print_json(report)
    else:
        show(report, settings)
    return 0


def show(report: dict[str, Any], settings: AuditInputs) -> None:
    """Prints each attack's sentence and the verdict."""
    console = table_console()
    for request in report["requests"]:
        audited = request["audited"]
        console.print(
            audit_table(
                request,
                f"Audit of {settings.model}: {audited['rows']} of {request['forget']['rows']} rows"
                f" of {request['forget']['source']}, budget {settings.budget}",
            )
        )
        for attack in request["attacks"].values():
            console.print(attack["sentence"], soft_wrap=True)
        for name, why in request["not_run"].items():
            console.print(f"{name}: not run: {why}", soft_wrap=True)
        _print_verdict(console, request["verdict"], "Verdict")
    if len(report["requests"]) > 1:
        _print_verdict(console, report["verdict"], "Verdict over all requests")


def _print_verdict(console: Console, verdict: dict[str, Any], title: str) -> None:
    console.print(f"{title}: {verdict['verdict'] or 'none'}: {verdict['sentence']}", soft_wrap=True)
    for finding in verdict["findings"][1:]:
        console.print(f"  also {finding['verdict']}: {finding['sentence']}", soft_wrap=True)
