"""`expunge report`: what a run did, for those who asked for it and those who review it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.cli.options import parse
from expunge.reporting.material import ReportInputs
from expunge.reporting.report import DATA, PAGE, write_report
from expunge.terminal import plain_console, quiet


@dataclass(frozen=True)
class Report(ReportInputs):
    """expunge report RUN [--scores BEFORE.json AFTER.json] [--oracle-scores O.json] [--audit audit.json]

    Writes what a run did, what it reached and what nobody measured. The files are report.html (one
    page, needs no network), report.json and a section in RUN/README.md. They hold no text of a row
    without --reveal --forget F.
    """


def main(arguments: Sequence[str]) -> int:
    """Parses, writes, says where."""
    settings = parse(Report, arguments, "expunge report", "run", ("subject",))
    report = write_report(settings)
    if quiet.get():
        return 0
    console = plain_console(soft_wrap=True)
    summary = report["summary"]
    console.print(summary["title"] + (f": {summary['sentence']}" if summary["sentence"] else ""))
    for caution in summary["cautions"]:
        console.print(caution)
    for entry in report["not_measured"]:
        console.print(f"not measured: {entry['what']}")
    output = Path(settings.output or settings.run)
    console.print("written: " + ", ".join(str(output / name) for name in (PAGE, DATA)))
    return 0
