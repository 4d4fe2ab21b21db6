"""`expunge requests` at the command line: what it prints, refuses and keeps to itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import write_jsonl
from expunge.cli.requests import SUBCOMMANDS
from expunge.ledger.store import LedgerPlace

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def requests(run_cli: Cli, place: LedgerPlace) -> Cli:
    def call(subcommand: str, *arguments: object) -> tuple[int, str, str]:
        return run_cli("requests", subcommand, *arguments, "--ledger", place.ledger)

    return call


def test_a_request_from_its_coming_in_to_its_evidence(
    requests: Cli,
    run_cli: Cli,
    subjects: list[Path],
    tmp_path: Path,
    forget_rows: list[dict[str, str]],
    row_files: dict[str, Path],
) -> None:
    printed = []

    def said(subcommand: str, *arguments: object) -> str:
        code, out, err = requests(subcommand, *arguments)
        assert (code, err) == (0, "")
        printed.append(out)
        return out

    dated = ("--received", "2026-01-05", "--due", "30d", "--subject", "case-1")
    out = said("add", subjects[0], *dated, "--retain", row_files["retain"], "--by", "Kim")
    assert out == f"request 1: 2 rows of {subjects[0]}, received 2026-01-05, due 2026-02-04\n"
    out = said("add", "--forget", row_files["forget"])
    assert "2 of its rows are in request 1 as well" in out
    rows = [line.split() for line in said("list").splitlines() if line.strip()]
    assert ["1", "open", "2026-01-05", "2026-02-04", "overdue", "2", "-", "case-1"] in rows
    listed = json.loads(said("list", "--json"))
    assert [(each["id"], each["overdue"], each["rows"]) for each in listed] == [
        (1, True, 2),
        (2, False, 8),
    ]
    assert said("update", 1, "--due", "2999-01-01") == "request 1: recorded (open, due 2999-01-01)\n"
    assert said("withdraw", 2) == "request 2: withdrawn (withdrawn)\n"
    shown = said("show", 1)
    assert "row ids: ada00sc1, ada00qa0" in shown
    assert "added: open, by Kim" in shown
    assert "updated (due): open" in shown
    record = json.loads(said("show", 1, "--json"))
    assert [event["action"] for event in record["events"]] == ["added", "updated"]
    assert "request.json (not signed" in said("export", 1, "--output", tmp_path / "1.zip")
    code, out, _ = run_cli("requests", "verify-bundle", tmp_path / "1.zip")
    assert code == 0
    assert out.splitlines() == [
        f"{tmp_path / '1.zip'}: request 1 (open), 1 files as listed",
        "not signed: who made it is not shown",
    ]
    code, out, _ = run_cli("requests", "verify-bundle", tmp_path / "1.zip", "--json")
    assert json.loads(out)["signed_by"] is None
    texts = [row[column] for row in forget_rows for column in ("input", "output")]
    assert [text for text in texts if text in "".join(printed)] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("lst", ("unknown subcommand 'lst'; did you mean list?",)),
        ("add", ("FORGET: is missing; give rows to remove",)),
        ("add {none}", ("{none}: no such file or directory",)),
        ("add {faulty}", ("{faulty} line 1: column 'output' is empty",)),
        ("add {rows} --due soon", ("--due soon: is no date",)),
        ("add {rows} --du 3d", ("--du", "did you mean --due?")),
        ("list --ledger {none}", ("--ledger {none}: no such file", "add makes a ledger")),
        ("list --ledger {rows}", ("--ledger {rows}: is no ledger",)),
        ("show 7", ("request 7: is not in", "it holds 1 to 1")),
        ("show 99999999999999999999", ("request 99999999999999999999: is not in",)),
        ("show one", ("--id", "'one'")),
        ("update 1", ("nothing to record; give --forget, --retain or --due",)),
        ("reopen 1", ("request 1: is open; nothing to do",)),
        ("export 1 --output {none}/x.zip", ("make it first",)),
        ("verify {none} --output {none}/x", ("--output", "its parent does not exist")),
    ],
)
def test_wrong_input_is_one_line_with_the_mend(
    arguments: str,
    words: tuple[str, ...],
    requests: Cli,
    run_cli: Cli,
    subjects: list[Path],
    tmp_path: Path,
    place: LedgerPlace,
) -> None:
    requests("add", subjects[0])
    before = place.path.read_bytes()
    faulty = write_jsonl(tmp_path / "faulty.jsonl", [{"input": "canary-4711", "output": ""}])
    names = {"none": tmp_path / "none", "faulty": faulty, "rows": subjects[0]}
    subcommand, *rest = (word.format(**names) for word in arguments.split())
    ledger = () if "--ledger" in rest else ("--ledger", place.ledger)
    code, out, err = run_cli("requests", subcommand, *rest, *ledger)
    assert (code, out, err.count("\n")) == (2, "", 1)
    for word in words:
        assert word.format(**names) in err
    assert "canary" not in err
    assert place.path.read_bytes() == before


def test_a_bundle_that_was_damaged_is_one_line(
    requests: Cli, run_cli: Cli, subjects: list[Path], tmp_path: Path
) -> None:
    requests("add", subjects[0], "--subject", "case-1")
    bundle = tmp_path / "1.zip"
    assert requests("export", 1, "--output", bundle)[0] == 0
    content = bundle.read_bytes()
    assert content.count(b"case-1") == 1  # nothing is compressed
    bundle.write_bytes(content.replace(b"case-1", b"case-2"))
    code, out, err = run_cli("requests", "verify-bundle", bundle)
    assert (code, out, err.count("\n")) == (2, "", 1)  # the zip's own checksum
    assert "is no zip file, or a damaged one" in err


def test_every_subcommand_has_help(run_cli: Cli) -> None:
    code, out, _ = run_cli("requests", "--help")
    assert code == 0
    for name in SUBCOMMANDS:
        assert f"  {name} " in out
        if name == "serve":  # brings all of a run; test_serving starts it
            continue
        code, text, _ = run_cli("requests", name, "--help")
        assert code == 0
        assert f"expunge requests {name}" in text
    assert run_cli("requests")[0] == 2
