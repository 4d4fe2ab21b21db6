"""A report, from files to files: everything is read and rendered before the first file is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from expunge.errors import RunError
from expunge.reporting.content import content
from expunge.reporting.material import ReportInputs, gather
from expunge.reporting.model_card import README, read_card, with_section
from expunge.reporting.rendering import card_section, markdown, page

PAGE, MARKDOWN, DATA = "report.html", "report.md", "report.json"


def write_report(inputs: ReportInputs) -> dict[str, Any]:
    """Writes report.html, report.md, report.json and the model card's section; returns report.json.

    Raises InputError with nothing written, RunError where a file cannot be written.
    """
    material = gather(inputs)
    report = content(material)
    output = material.directory if inputs.output is None else Path(inputs.output)
    # As it will be read again, so that the page shows what the file says.
    data = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    report = json.loads(data)
    files = {
        output / DATA: data,
        output / MARKDOWN: markdown(report),
        output / PAGE: page(report),
    }
    card = material.directory / README
    public = {}
    if inputs.card:
        public[card] = with_section(read_card(card), card_section(report), card)
    try:
        output.mkdir(exist_ok=True)
        for path, text in files.items():
            _write(path, text, private=inputs.reveal)
        for path, text in public.items():
            _write(path, text, private=False)
    except OSError as error:
        where = error.filename or output
        raise RunError(f"{where}: {error.strerror}; the report is not complete there") from None
    return report


def _write(path: Path, text: str, *, private: bool) -> None:
    """Whole or not at all; revealed text for the owner's eyes only."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.unlink(missing_ok=True)
    mode = 0o600 if private else 0o666
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8", newline="") as file:  # noqa: PTH123
            file.write(text)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
