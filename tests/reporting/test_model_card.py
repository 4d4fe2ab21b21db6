"""The model card's section: written once, renewed in place, and nothing else touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_run import made_up

from conftest import refusal
from expunge.reporting.material import ReportInputs
from expunge.reporting.model_card import BEGIN, END, with_section
from expunge.reporting.report import write_report

CARD = "---\nlicense: apache-2.0\n---\n# A model\n\nText with  two spaces.  \n"


def test_a_section_is_added_and_then_renewed_in_place() -> None:
    place = Path("README.md")
    assert with_section("", "one", place) == f"{BEGIN}\none\n{END}\n"
    first = with_section(CARD, "one", place)
    assert first.startswith(CARD.rstrip())
    more = first + "\n## Below\n"
    second = with_section(more, "two\n", place)
    assert second == more.replace("one", "two")
    assert with_section(second, "two", place) == second


@pytest.mark.parametrize(
    "card", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", f"{BEGIN}{BEGIN}{END}"]
)
def test_marks_that_are_no_pair_are_refused(card: str) -> None:
    message = refusal(lambda: with_section(card, "x", Path("out/README.md")))
    assert message.startswith("out/README.md: its two marks")
    assert "--no-card" in message


def test_the_card_of_a_run_keeps_what_its_owner_wrote(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made_up(run)
    (run / "README.md").write_bytes(CARD.replace("\n", "\r\n").encode())
    for _ in range(2):
        write_report(ReportInputs(run=str(run)))
        card = (run / "README.md").read_bytes()
        assert card.startswith(CARD.replace("\n", "\r\n").rstrip().encode())
        assert card.count(BEGIN.encode()) == 1
        assert b"1,250 rows were to be removed, 40 to be kept" in card
        assert b"Not audited" in card
    (run / "README.md").write_bytes(b"\xff")
    message = refusal(lambda: write_report(ReportInputs(run=str(run))))
    assert "cannot be read as UTF-8 text" in message
    write_report(ReportInputs(run=str(run), card=False))
    assert (run / "README.md").read_bytes() == b"\xff"


def test_a_report_elsewhere_leaves_the_run_alone_but_for_its_card(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made_up(run)
    before = sorted(path.name for path in run.iterdir())
    write_report(ReportInputs(run=str(run), output=str(tmp_path / "out"), card=False))
    assert sorted(path.name for path in run.iterdir()) == before
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["report.html", "report.json"]
