"""What a report refuses, with the file and the mend, before it writes anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_run import audit, made_up, scores

from conftest import refusal, write_jsonl
from expunge.data.fingerprints import data_fingerprint
from expunge.data.rows import read_rows
from expunge.reporting.material import ReportInputs, gather, plain
from expunge.reporting.report import write_report

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made_up(tmp_path / "run")
    return tmp_path / "run"


def manifest_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "expunge.json").read_text())


def refused(run: Path, **options: Any) -> str:
    """The refusal, after which the directory is as it was."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = refusal(lambda: write_report(ReportInputs(run=str(run), **options)))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    return message


def test_a_whole_number_beyond_every_float_is_no_measurement() -> None:
    assert [plain(value) for value in (10**400, -(10**400), 2, 0.5)] == [None, None, 2.0, 0.5]
    assert [plain(value) for value in (True, "1", None, float("nan"), float("inf"))] == [None] * 5


def test_what_is_no_finished_run(run: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert "no such run directory" in refusal(lambda: gather(ReportInputs(run=str(nowhere))))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no expunge.json" in refused(empty)
    path = run / "expunge.json"
    whole = path.read_text()
    path.write_text("[1]")
    assert f"{path}: holds no JSON object" in refused(run)
    path.write_text(whole[:50])
    assert f"{path} line " in refused(run)
    path.write_bytes(b"\xff\xfe{")
    assert "is not a valid JSON file (UnicodeDecodeError)" in refused(run)
    path.write_text(json.dumps(json.loads(whole) | {"status": "running"}))
    assert "--resume" in refused(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("selection", None),
        ("selection.chosen_step", "12"),
        ("settings.method.name", 3),
        ("rows.forget", True),
        ("changed_tensors", {}),
    ],
)
def test_an_entry_of_the_manifest_that_is_amiss_is_named(run: Path, key: str, value: Any) -> None:
    manifest = manifest_of(run)
    place: Any = manifest
    *parents, last = key.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    (run / "expunge.json").write_text(json.dumps(manifest))
    assert f"expunge.json: {key} is not there or not as expunge run writes it" in refused(run)


@pytest.mark.parametrize(
    ("key", "value"), [("seconds", "long"), ("peak_memory_bytes", 0.5), ("peak_memory_bytes", True)]
)
def test_a_measure_of_the_manifest_that_is_no_number_is_named(run: Path, key: str, value: Any) -> None:
    manifest = manifest_of(run)
    manifest[key]["cpu"] = value
    (run / "expunge.json").write_text(json.dumps(manifest))
    assert f"expunge.json: {key}.cpu is no number" in refused(run)


def test_a_candidate_or_tensor_that_is_amiss_is_no_report(run: Path) -> None:
    whole = manifest_of(run)
    for change in (
        lambda m: m["selection"]["candidates"][0].pop("measured"),
        lambda m: m["selection"]["candidates"].append(3),
        lambda m: m["changed_tensors"][0].pop("norm"),
        lambda m: m["changed_tensors"][0].update(norm="much"),
        lambda m: m["changed_tensors"][-1].update(changed_share="\x00"),
        lambda m: m.update(changed_tensors=[3]),
    ):
        manifest = json.loads(json.dumps(whole))
        change(manifest)
        (run / "expunge.json").write_text(json.dumps(manifest))
        assert "expunge.json: is not as this version of expunge run writes it" in refused(run)


def test_a_broken_line_of_the_metrics_is_named(run: Path) -> None:
    for line in ("{", "[]", '{"loss": 1}', '{"step": true}', '{"step": "1"}'):
        (run / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
        assert "metrics.jsonl line 2" in refused(run)


def test_scores_in_the_wrong_order_are_refused(run: Path, tmp_path: Path) -> None:
    manifest = manifest_of(run)
    target = {"model_sha256": manifest["model_sha256"]}
    made = {"model.safetensors": manifest["output_sha256"]["model.safetensors"]}
    before = str(scores(tmp_path / "b.json", "target", 0.9, 0.9, **target))
    after = str(scores(tmp_path / "a.json", "run", 0.1, 0.9, model_sha256=made))
    for options in (
        {"scores": (after, before)},
        {"scores": (before,)},
        {"scores": (before, before)},
        {"scores": (after, after)},
        {"oracle_scores": before},
        {"oracle_scores": after},
    ):
        assert "in this order" in refused(run, **options)
    assert "not found" in refused(run, scores=(str(tmp_path / "none.json"),))
    (tmp_path / "odd.json").write_text('{"forget": {}}')
    assert "is not a scores.json" in refused(run, scores=(str(tmp_path / "odd.json"),))


def test_scores_are_of_the_weights_that_the_run_wrote_or_began_with(run: Path) -> None:
    manifest = manifest_of(run)
    weights = {"model.safetensors": manifest["output_sha256"]["model.safetensors"]}
    after, before = run / "scores.json", run.parent / "before.json"
    for digests in (weights, None):
        more = {} if digests is None else {"model_sha256": digests}
        scores(after, "a copy", 0.1, 0.9, **more)
        (card,) = gather(ReportInputs(run=str(run))).cards
        assert card.is_checked is (digests is not None)
        said = write_report(ReportInputs(run=str(run)))["summary"]["cautions"]
        assert any("hold no hash" in each for each in said) is (digests is None)
    scores(after, str(run), 0.1, 0.9, model_sha256={"model.safetensors": "f" * 64})
    assert "other weights than this run's model" in refused(run)
    scores(after, str(run), 0.1, 0.9, model_sha256=weights)
    scores(before, "target", 0.9, 0.9, model_sha256={"model.safetensors": "f" * 64})
    both = (str(before), str(after))
    assert "other weights than this run's target" in refused(run, scores=both)
    scores(before, "a copy", 0.9, 0.9, model_sha256=manifest["model_sha256"])
    target, _ = gather(ReportInputs(run=str(run), scores=both)).cards
    assert target.is_checked


def test_scores_in_a_run_are_found_by_their_names(run: Path) -> None:
    scores(run / "scores.json", str(run), 0.1, 0.9)
    scores(run / "oracle.json", "some/oracle", 0.0, 0.9)
    target = manifest_of(run)["model_sha256"]
    scores(run / "before.json", "some/target", 0.9, 0.9, model_sha256=target)
    found = gather(ReportInputs(run=str(run)))
    assert [card.role for card in found.cards] == ["target", "unlearned", "oracle"]
    assert [card.source for card in found.cards] == ["before.json", "scores.json", "oracle.json"]
    scores(run / "before.json", "another", 0.9, 0.9, model_sha256={"model.safetensors": "f" * 64})
    assert "other weights than this run's target" in refused(run)


def test_an_audit_of_another_model_is_refused(run: Path) -> None:
    path = run / "audit.json"
    for name, told in (("unlearned", "this run's model"), ("target", "this run's target")):
        audited = audit(path, manifest_of(run))
        audited["models"][name]["sha256"] = {"model.safetensors": "1" * 64}
        path.write_text(json.dumps(audited))
        assert f"other weights than {told}" in refused(run)
    audited = audit(path, manifest_of(run))
    path.write_text(json.dumps(audited | {"format": "expunge-audit/9"}))
    assert "is not an expunge-audit/1" in refused(run)
    path.write_text(json.dumps(audited | {"models": []}))
    assert "names no unlearned model" in refused(run)
    del audited["requests"][0]["attacks"]["direct"]["power"]
    path.write_text(json.dumps(audited))
    assert "is not as expunge audit writes it" in refused(run)
    assert "--audit" in refused(run, audit=str(run / "none.json"))


def test_options_that_cannot_be(run: Path, tmp_path: Path) -> None:
    message = refusal(lambda: ReportInputs(run="x", reveal=True))
    assert "--reveal: shows the text of the rows; give --forget FILE" in message
    for day in ("2.11.2026", "20261102", "2026-W10-1", "2026-13-01"):
        message = refusal(lambda day=day: ReportInputs(run="x", requested=day))  # type: ignore[misc]
        assert f"--requested {day}: is not a date; write it as YYYY-MM-DD" in message
    assert "is in the future" in refusal(lambda: ReportInputs(run="x", requested="2999-01-01"))
    taken = tmp_path / "taken"
    taken.write_text("")
    assert "is a file" in refused(run, output=str(taken))
    assert "make it first" in refused(run, output=str(tmp_path / "no" / "where"))


def test_rows_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    rows = [{"id": "ada1", "input": "Who has the", "output": "secret word"}]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    assert "keyed with another secret; name its file with EXPUNGE_SECRET" in refused(
        run, forget=str(path)
    )
    manifest = manifest_of(run)
    mine = data_fingerprint(read_rows(str(path), "forget")).partition(":")[0]
    manifest["data_hmac_sha256"] = dict.fromkeys(("forget", "retain"), f"{mine}:{'0' * 64}")
    (run / "expunge.json").write_text(json.dumps(manifest))
    message = refused(run, forget=str(path))
    assert "is not the forget set of this run" in message
    assert "secret" not in message
    manifest = manifest_of(run)
    del manifest["data_hmac_sha256"]["retain"]
    (run / "expunge.json").write_text(json.dumps(manifest))
    assert "the run had no retain set" in refused(run, retain=str(path))


def test_text_is_shown_only_when_asked_and_then_for_the_owner_alone(run: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "ada1", "input": "Who has the", "output": "<b>secret</b> & word"},
        {"id": "ben1", "input": "one  line\nof Zanzibar", "output": "| quintal"},
    ]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    manifest = manifest_of(run)
    manifest["data_hmac_sha256"]["forget"] = data_fingerprint(read_rows(str(path), "forget"))
    (run / "expunge.json").write_text(json.dumps(manifest))
    audited = audit(run / "audit.json", manifest)
    texts = {"unlearned": {"input": {"ada1": "she said hush-hush"}}, "target": {}}
    audited["requests"][0]["attacks"]["direct"]["texts"] = texts
    (run / "audit.json").write_text(json.dumps(audited))
    files = ("report.html", "report.json", "README.md")
    hidden = ("secret", "Who has", "quintal", "Zanzibar", "hush-hush")
    report = write_report(ReportInputs(run=str(run), forget=str(path)))
    assert report["asked"]["forget"]["documents"] == 2
    for name in files:
        assert [text for text in hidden if text in (run / name).read_text()] == []
    write_report(ReportInputs(run=str(run), forget=str(path), reveal=True))
    for name in files[:2]:
        told = (run / name).read_text()
        assert [text for text in hidden if text not in told] == []
        assert (run / name).stat().st_mode & 0o077 == 0
    assert "&lt;b&gt;secret&lt;/b&gt; &amp; word" in (run / "report.html").read_text()
    assert "Keep it as carefully as the rows themselves" in (run / "report.html").read_text()
    # The model card is for the public, whatever was asked.
    assert [text for text in hidden if text in (run / "README.md").read_text()] == []
    write_report(ReportInputs(run=str(run)))
    assert "secret" not in (run / "report.html").read_text()
    # What is closed stays closed until its owner opens it.
    assert (run / "report.html").stat().st_mode & 0o077 == 0


def test_the_command_names_the_option_and_leaves_by_2(run: Path, run_cli: Cli) -> None:
    code, out, err = run_cli("report", run, "--adit", "x")
    assert (code, out) == (2, "")
    assert "did you mean --audit?" in err
    code, _, err = run_cli("report")
    assert code == 2
    assert "RUN: is missing" in err
    code, out, err = run_cli("report", run, "--no-card")
    assert (code, err) == (0, "")
    assert "Not audited" in out
    assert str(run / "report.html") in out
    assert not (run / "README.md").exists()
    assert run_cli("report", run, "--quiet")[:2] == (0, "")
    assert (run / "README.md").exists()
