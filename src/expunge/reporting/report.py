"""A report, from files to files: everything is read and rendered before the first file is written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from expunge.disk import check_file_output, check_writable, deliver, explained, made
from expunge.errors import RunError
from expunge.reporting.content import FORMAT, content
from expunge.reporting.material import ReportInputs, gather
from expunge.reporting.model_card import README, read_card, with_section
from expunge.reporting.rendering import card_section, page

PAGE, DATA = "report.html", "report.json"
_BEGINNINGS = {
    PAGE: "<title>Unlearning report: ",
    DATA: f'{{\n  "format": "{FORMAT}"',
}
"""What tells each of them from a file of the user's."""


def write_report(inputs: ReportInputs) -> dict[str, Any]:
    """Writes report.html, report.json and the model card's section; returns report.json.

    Raises InputError with nothing written, RunError where a file cannot be written.
    """
    material = gather(inputs)
    report = content(material)
    output = material.directory if inputs.output is None else Path(inputs.output)
    _check_output(output, inputs)
    # As it will be read again, so that the page shows what the file says.
    data = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    report = json.loads(data)
    files = {
        output / DATA: data,
        output / PAGE: page(report),
    }
    card = material.directory / README
    public = {}
    if inputs.card:
        public[card] = with_section(read_card(card), card_section(report), card)
    try:
        with made(output):
            deliver({**files, **public}, private=[*files] if inputs.reveal else ())
    except OSError as error:
        raise RunError(explained(error)) from None
    return report


def _check_output(output: Path, inputs: ReportInputs) -> None:
    check_writable(output, inside=True)
    read = {name: getattr(inputs, name) for name in ("oracle_scores", "audit", "forget", "retain")}
    read |= {f"scores {number}": path for number, path in enumerate(inputs.scores, 1)}
    for name, beginning in _BEGINNINGS.items() if output.is_dir() else ():
        check_file_output("output", output / name, read, partial(_has, beginning))


def _has(beginning: str, text: str) -> bool:
    return beginning in text[:2000]
