"""Reports of made-up runs: what was not measured stays empty, and every number is that of its file."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from made_up_run import audit, estimate, made_up, measured, parsed, scores, words

from expunge.errors import RunError
from expunge.evaluation.scorecard import Scorecard
from expunge.reporting import report as writing
from expunge.reporting.grids import at
from expunge.reporting.material import ReportInputs
from expunge.reporting.report import write_report

SCHEMA = Path(writing.__file__).with_name("report.schema.json")
Check = Callable[[Any], None]


@pytest.fixture(scope="module")
def fits() -> Check:
    """Validates against the schema; without the library the rest of a test still counts."""
    try:
        jsonschema = import_module("jsonschema")
    except ImportError:
        return lambda _report: None
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).validate


def shown(page: ET.Element) -> list[tuple[str, str, str]]:
    """Place in report.json, exact value and text of every number on the page."""
    return [(each.attrib["data-at"], each.attrib["value"], words(each)) for each in page.iter("data")]


def check_numbers(page: ET.Element, report: dict[str, Any]) -> int:
    """Each number on the page is what report.json holds at the place that the page names."""
    for pointer, exact, text in shown(page):
        value = at(report, pointer)
        assert float(exact) == value
        if text.endswith("%"):
            assert float(text[:-1]) / 100 == pytest.approx(value, abs=5.1e-4)
        elif text.endswith(("s", "min", "B", "bytes")):
            assert re.search(r"\d", text)
        else:
            read = float(text.replace(",", ""))
            assert read == pytest.approx(value, abs=5.1e-4, rel=5.1e-4)
            if isinstance(value, int):
                assert read == value
    return len(shown(page))


def read(directory: Path) -> tuple[ET.Element, dict[str, Any]]:
    """Page and data."""
    page = parsed((directory / "report.html").read_text(encoding="utf-8"))
    data = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    return page, data


def test_without_scores_and_audit_nothing_is_filled_in(tmp_path: Path, fits: Check) -> None:
    made_up(tmp_path / "run")
    write_report(ReportInputs(run=str(tmp_path / "run")))
    page, data = read(tmp_path / "run")
    fits(data)
    assert check_numbers(page, data) > 40
    assert data["summary"]["status"] == "not-audited"
    assert (data["scorecard"], data["audit"]) == (None, None)
    for measure in data["measures"]:
        assert set(measure["values"].values()) == {None}
    told = words(page)
    assert "Not audited" in told
    assert "The date of the request was not given." in told
    assert "An audit: whether attacks get the removed content back" in told
    assert "expunge audit RUN --original TARGET" in told
    # What the run measured itself is said to be that, with how many rows it was measured on.
    assert "On 64 of its rows that the run measured itself" in told
    numbers = page.find(".//table[@class='numbers']")
    assert numbers is not None
    assert words(numbers).count("not measured, of no model") == 6
    assert numbers.find(".//svg") is None


def test_the_strongest_attack_is_that_of_all_requests_and_none_that_reads_inside(
    tmp_path: Path, fits: Check
) -> None:
    manifest = made_up(tmp_path / "run")
    path = tmp_path / "run" / "audit.json"
    audited = audit(path, manifest)
    first = audited["requests"][0]
    quantize = first["attacks"]["quantize"]
    inside = {**quantize, "kind": "latent", "recovered": {**quantize["recovered"], "value": 0.96}}
    second = json.loads(json.dumps(first))
    second["attacks"]["quantize"]["recovered"]["value"] = 0.4
    first["attacks"]["latent"] = inside
    audited["requests"].append(second)
    path.write_text(json.dumps(audited))
    write_report(ReportInputs(run=str(tmp_path / "run")))
    page, data = read(tmp_path / "run")
    fits(data)
    (strongest,) = [m for m in data["measures"] if m["name"] == "strongest_attack"]
    assert strongest["values"]["unlearned"] == 0.4
    assert strongest["title"].endswith("(request 2 of 2)")
    assert "Request 1 of 2: f.jsonl" in words(page)


def test_the_depth_is_shown_beside_the_attacks(tmp_path: Path, fits: Check) -> None:
    manifest = made_up(tmp_path / "run")
    path = tmp_path / "run" / "audit.json"
    audited = audit(path, manifest)
    attacks = audited["requests"][0]["attacks"]
    figure = {"value": 0.731, "low": 0.512, "high": 0.904}
    attacks["depth"] = {
        **attacks["quantize"],
        "title": "Unlearning depth",
        "kind": "depth",
        "sentence": "Unlearning depth: 0.73.",
        "recovered": None,
        "depth": figure,
        "models": {n: {"variants": {}, "numbers": {}} for n in ("target", "unlearned", "oracle")},
    }
    path.write_text(json.dumps(audited))
    write_report(ReportInputs(run=str(tmp_path / "run")))
    page, data = read(tmp_path / "run")
    fits(data)
    shown = {a["name"]: a for a in data["audit"]["requests"][0]["attacks"]}
    assert shown["depth"]["depth"] == figure
    assert shown["quantize"]["depth"] is None
    assert "Unlearning depth 0.731 ( 0.512 to 0.904 )" in words(page)
    (strongest,) = [m for m in data["measures"] if m["name"] == "strongest_attack"]
    assert "depth" not in strongest["title"]


def test_each_tuning_is_shown_with_the_retain_rows_that_it_leaves(tmp_path: Path, fits: Check) -> None:
    manifest = made_up(tmp_path / "run")
    path = tmp_path / "run" / "audit.json"
    audited = audit(path, manifest)
    audited["requests"][0]["attacks"]["quantize"]["tunings"] = {
        "rate x0.3": {
            "recovered": estimate(0.125, 0.0, 0.5),
            "retain": {"target": 1.0, "unlearned": 0.75},
        },
        "rate x3": {"recovered": None, "retain": {"target": 0.25, "unlearned": 0.0}},
    }
    path.write_text(json.dumps(audited))
    write_report(ReportInputs(run=str(tmp_path / "run")))
    page, data = read(tmp_path / "run")
    fits(data)
    check_numbers(page, data)
    told = words(page)
    assert "rate x0.3 0.125 ( 0.000 to 0.500 ) 100.0% 75.0% not measured" in told
    assert "rate x3 no claim 25.0% 0.0% not measured" in told


def test_every_part_is_that_of_its_file(tmp_path: Path, fits: Check) -> None:
    manifest = made_up(tmp_path / "run")
    run = str(tmp_path / "run")
    before = scores(tmp_path / "b.json", "some/target", 0.96, 0.92, mia_auc=0.99, utility=0.5)
    after = scores(tmp_path / "a.json", run, 0.08, 0.8, mia_auc=0.61, utility=0.47)
    oracle = scores(tmp_path / "o.json", "some/oracle", 0.04, 0.9)
    audited = audit(tmp_path / "run" / "audit.json", manifest, oracle=True)
    inputs = ReportInputs(
        run=run,
        scores=(str(before), str(after)),
        oracle_scores=str(oracle),
        requested="2026-10-01",
        subject="case 4711",
    )
    write_report(inputs)
    page, data = read(tmp_path / "run")
    fits(data)
    assert check_numbers(page, data) > 130
    columns = [column["role"] for column in data["scorecard"]["columns"]]
    assert columns == ["target", "unlearned", "oracle"]
    cards = [Scorecard.from_json(json.loads(path.read_text())) for path in (before, after, oracle)]
    for row in data["scorecard"]["rows"]:
        for card, value in zip(cards, row["values"], strict=True):
            if row["split"] == "total":
                assert value == getattr(card, row["part"])
            else:
                assert value == getattr(card, row["split"])[row["task"]][row["part"]]
    assert len(data["scorecard"]["rows"]) == 2 * 3 + 5  # no row for a part that nobody has
    values = {measure["name"]: measure["values"] for measure in data["measures"]}
    mean = (0.08 + 0.04 + 0.02) / 3
    assert values["forget"]["unlearned"] == pytest.approx(mean)
    assert values["mia_auc"] == {"target": 0.99, "unlearned": 0.61, "oracle": None}
    assert values["strongest_attack"] == {"target": 1.0, "unlearned": 0.25, "oracle": 0.0}
    (request,) = data["audit"]["requests"]
    source = audited["requests"][0]["attacks"]
    for attack in request["attacks"]:
        recovered = source[attack["name"]]["recovered"]
        for key in ("value", "low", "high"):
            assert attack[key] == (None if recovered is None else recovered[key])
    assert request["came_back"] == {
        "facts": 2, "attacks": 1, "target": 2, "unlearned": 1, "oracle": 0,
    }  # fmt: skip
    assert [fact["id"] for fact in request["facts"]] == ["ada1"]
    assert data["summary"]["weakest"]["sentence"] == "Quantisation: half of it."
    figure = page.find(".//svg[@class='comparison']")
    assert figure is not None
    # One attack with power extracts: a mark a model.
    assert [len(figure.findall(tag)) for tag in ("rect", "circle", "path")] == [1, 1, 1]
    assert data["summary"]["title"] == "Partly forgotten"
    assert data["asked"]["forget"] == {"rows": 1250, "documents": 60, "source": "f.jsonl"}
    document = words(page)
    assert "Remove 1,250 rows of 60 documents" in document
    assert "Requested on 2026-10-01. Reference: case 4711." in document
    assert "f.jsonl, 2 of 1250 rows, budget quick: Quantisation, Membership inference." in document
    assert "Not tried: relearn." in document
    assert "finished 2026-11-21 15:40:07 UTC" in document
    assert f"{mean:.1%} (the target" in document
    assert "Of 2 facts that were attacked, 1 came back" in document
    assert "over-unlearned" in document
    assert "--attacks leaves it out" in document
    assert "1 h 1 min" in document
    assert "1.6 GiB" in document


def test_training_is_told_with_the_kept_step(tmp_path: Path) -> None:
    made_up(tmp_path / "run")
    write_report(ReportInputs(run=str(tmp_path / "run")))
    page, data = read(tmp_path / "run")
    training = data["training"]
    assert training["curve"]["forget"]["first"] == 1000.0
    assert training["curve"]["forget"]["least"] == pytest.approx(1000.0 / 12)
    assert training["curve"]["retain"]["steps"] == 11  # the null of step 3 is no value
    assert training["curve"]["retain"]["drawn"][2] == [3.0, None]
    assert [candidate["chosen"] for candidate in training["candidates"]] == [False, True]
    assert training["candidates"][0]["mia_auc"] == measured(0.5, 0.95, 0.8)["mia_auc"]
    (curves, candidates) = page.findall(".//svg[@class='curves']")
    for figure in (curves, candidates):
        assert figure.attrib["aria-label"]
        assert any("kept: step 12" in (each.text or "") for each in figure.iter("text"))
    assert any("log scale" in (each.text or "") for each in curves.iter("text")) is False
    (kept,) = page.findall(".//tr[@class='kept']")
    assert words(kept).endswith("kept")


def test_changes_of_the_weights_are_summed_by_layer(tmp_path: Path) -> None:
    made_up(tmp_path / "run")
    write_report(ReportInputs(run=str(tmp_path / "run")))
    _, data = read(tmp_path / "run")
    first, second = data["weights"]["layers"]
    assert (first["layer"], second["layer"], second["tensors"]) == (2, 4, 2)
    assert second["norm"] == pytest.approx(5.0)
    assert second["change_norm"] == pytest.approx(0.5)
    assert second["relative"] == pytest.approx(0.1)
    assert data["weights"]["outside_layers"] == ["model.embed_tokens.weight"]


def test_a_destroyed_run_says_so_first(tmp_path: Path, fits: Check) -> None:
    candidates = [{"step": 12, "measured": measured(0.0, 0.02, None), "score": 0.001, "destroyed": True}]
    selection = {
        "target": measured(1.0, 0.98, None),
        "candidates": candidates,
        "chosen_step": 12,
        "why": "the last, as asked for",
        "stopped": "diverged: destroyed at 5 validations in a row",
        "judgement": {"ending": "destroyed", "why": "too little is left of the retain set"},
    }
    warning = "the kept checkpoint is destroyed: too little is left of the retain set"
    made_up(tmp_path / "run", selection=selection, warnings=[warning])
    before = scores(tmp_path / "b.json", "some/target", 0.96, 0.92)
    after = scores(tmp_path / "a.json", "x", 0.0, 0.01)
    write_report(ReportInputs(run=str(tmp_path / "run"), scores=(str(before), str(after))))
    page, data = read(tmp_path / "run")
    fits(data)
    check_numbers(page, data)
    assert data["summary"]["title"] == "Not audited; by what was measured: destroyed"
    cautions = data["summary"]["cautions"]
    assert cautions[0].startswith("Scorecard: destroyed: 0.01 is left on the retain set")
    assert cautions[1] == f"Run: {warning}."
    for sentence in cautions:
        assert sentence in words(page)
    assert "destroyed" in (tmp_path / "run" / "README.md").read_text()


def test_nulls_stay_empty(tmp_path: Path, fits: Check) -> None:
    selection: dict[str, Any] = {
        "target": None, "candidates": [], "chosen_step": 12, "why": "the last, as asked for",
        "stopped": "all steps done", "judgement": None,
    }  # fmt: skip
    manifest = made_up(
        tmp_path / "run",
        metrics=False,
        selection=selection,
        rows={"forget": 5},
        data_hmac_sha256={"forget": "0" * 64},
        changed_tensors=[],
        seed=None,
    )
    after = scores(tmp_path / "run" / "scores.json", "x", 0.1, None)
    audited = audit(tmp_path / "au.json", manifest)
    audited["verdict"] = {"verdict": None, "sentence": "too few", "weakest": None, "findings": []}
    request = audited["requests"][0]
    request["verdict"], request["kept"] = audited["verdict"], estimate(None)
    del request["attacks"]["quantize"]
    (tmp_path / "au.json").write_text(json.dumps(audited))
    write_report(ReportInputs(run=str(tmp_path / "run"), audit=str(tmp_path / "au.json")))
    page, data = read(tmp_path / "run")
    fits(data)
    check_numbers(page, data)
    assert data["summary"]["status"] == "no-verdict"
    assert data["training"]["curve"] is None
    assert data["weights"]["layers"] == []
    assert data["audit"]["requests"][0]["came_back"] is None
    values = {measure["name"]: measure["values"]["unlearned"] for measure in data["measures"]}
    assert values["retain"] is values["utility"] is values["strongest_attack"] is None
    missing = " ".join(entry["what"] for entry in data["not_measured"])
    for part in ("the retain set, membership inference, utility", "metrics.jsonl", "Candidates"):
        assert part in missing
    document = words(page)
    assert "No rows were named that must stay." in document
    assert "no attack had power" in document
    assert "None" not in document
    assert "nan" not in document.split()
    assert after.exists()


def test_numbers_that_are_not_finite_are_absent(tmp_path: Path) -> None:
    made_up(tmp_path / "run")
    lines = '{"step": 1, "forget": NaN, "retain": Infinity}\n{"step": 2, "forget": 1.0}\n'
    manifest_of(tmp_path / "run", "metrics.jsonl", lines)
    write_report(ReportInputs(run=str(tmp_path / "run")))
    _, data = read(tmp_path / "run")
    assert data["training"]["curve"]["forget"]["drawn"] == [[1.0, None], [2.0, 1.0]]
    assert data["training"]["curve"]["retain"] is None


def manifest_of(run: Path, name: str, text: str) -> None:
    """Replaces a file of the run together with its recorded hash."""
    import hashlib

    (run / name).write_text(text)
    manifest = json.loads((run / "expunge.json").read_text())
    manifest["output_sha256"][name] = hashlib.sha256(text.encode()).hexdigest()
    (run / "expunge.json").write_text(json.dumps(manifest))


SCRIPT = '<script>alert("x")</script>'


def test_names_from_outside_stay_text(tmp_path: Path, fits: Check) -> None:
    run = tmp_path / "<script>alert(1)<" / "script>"  # as a path, a slash parts it
    inputs = {"model": SCRIPT, "forget": f"{SCRIPT}|`x`", "retain": "r", "output": SCRIPT}
    manifest = made_up(
        run,
        warnings=[SCRIPT],
        changed_tensors=[],
        settings={
            "inputs": inputs, "method": {"name": SCRIPT, "k": SCRIPT}, "training": {SCRIPT: SCRIPT},
        },
        data_hmac_sha256={"forget": SCRIPT, SCRIPT: SCRIPT},
        seconds={SCRIPT: 1.0, "a/b~c": 2.0},
    )  # fmt: skip
    audit(run / "audit.json", manifest, fact=f"{SCRIPT}|| a")
    scores(run / "scores.json", f"{SCRIPT}'s", 0.1, 0.8)
    output = tmp_path / "out <script>"
    write_report(ReportInputs(run=str(run), output=str(output)))
    page, data = read(output)
    fits(data)
    check_numbers(page, data)
    assert page.findall(".//script") == []
    html = (output / "report.html").read_text()
    assert "<script" not in html
    assert words(page).count(SCRIPT) >= 8  # a reader sees them as they are
    card = (run / "README.md").read_text()
    assert "<script" not in card
    assert "&lt;script&gt;" in card


def test_the_page_loads_nothing_and_has_names_for_everything(tmp_path: Path) -> None:
    manifest = made_up(tmp_path / "run")
    audit(tmp_path / "run" / "audit.json", manifest, oracle=True)
    scores(tmp_path / "run" / "scores.json", "x", 0.1, 0.8)
    write_report(ReportInputs(run=str(tmp_path / "run")))
    page, _ = read(tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text()
    for loads in (" src=", "url(", "@import", "http://", "https://", "srcset", "<link", "<iframe"):
        assert loads not in html
    ids = [each.attrib["id"] for each in page.iter() if "id" in each.attrib]
    assert len(ids) == len(set(ids))
    for link in page.iter("a"):
        assert link.attrib["href"].startswith("#")
        assert link.attrib["href"][1:] in ids
    for each in page.iter():
        if "aria-labelledby" in each.attrib:
            assert each.attrib["aria-labelledby"] in ids
    for table in page.iter("table"):
        assert table.find("caption") is not None
        heads = [head.attrib["scope"] for head in table.findall("thead/tr/th")]
        assert heads
        assert set(heads) == {"col"}
        width = len(heads)
        for row in table.findall("tbody/tr"):
            cells = sum(int(cell.attrib.get("colspan", 1)) for cell in row)
            assert cells == width
    for figure in page.iter("svg"):
        if figure.attrib.get("aria-hidden") != "true":
            assert figure.attrib["role"] == "img"
            assert len(figure.attrib["aria-label"]) > 20
    levels = [int(each.tag[1]) for each in page.iter() if re.fullmatch("h[1-6]", str(each.tag))]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.attrib["lang"] == "en"
    assert len(html) < 150_000


def test_thousands_of_steps_keep_the_page_small(tmp_path: Path) -> None:
    made_up(tmp_path / "run", steps=20_000)
    write_report(ReportInputs(run=str(tmp_path / "run")))
    page, data = read(tmp_path / "run")
    assert len(data["training"]["curve"]["forget"]["drawn"]) == 300
    assert (tmp_path / "run" / "report.html").stat().st_size < 150_000
    (curves, _) = page.findall(".//svg[@class='curves']")
    assert any("log scale" in (each.text or "") for each in curves.iter("text"))


def test_files_that_changed_since_the_run_are_named(tmp_path: Path) -> None:
    made_up(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"num_hidden_layers": 7}')
    (tmp_path / "run" / "model.safetensors").unlink()
    report = write_report(ReportInputs(run=str(tmp_path / "run")))
    cautions = " ".join(report["summary"]["cautions"])
    assert "may not be about them: config.json." in cautions
    assert "are gone: model.safetensors." in cautions


def test_scores_of_other_rows_are_named(tmp_path: Path) -> None:
    made_up(tmp_path / "run")
    details = {"rows": {"forget": 96, "retain": 40}}
    scores(tmp_path / "run" / "scores.json", "x", 0.1, 0.8, details=details)
    report = write_report(ReportInputs(run=str(tmp_path / "run")))
    assert report["summary"]["cautions"][1:] == [
        "The scores of unlearned are of 96 forget rows, the run had 1250."
    ]


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    manifest = made_up(tmp_path / "run")
    audit(tmp_path / "run" / "audit.json", manifest)
    found = []
    for _ in range(2):
        write_report(ReportInputs(run=str(tmp_path / "run")))
        names = ("report.html", "report.json", "README.md")
        found.append([(tmp_path / "run" / name).read_bytes() for name in names])
    assert found[0] == found[1]


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(tmp_path / "run")
    write_report(ReportInputs(run=str(tmp_path / "run")))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_report(ReportInputs(run=str(tmp_path / "run"), requested="2026-01-01"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_beaten_schema_is_noticed(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="is in the extra dev")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    made_up(tmp_path / "run")
    report = write_report(ReportInputs(run=str(tmp_path / "run")))
    assert validator.is_valid(report)
    for change in (
        lambda r: r.pop("summary"),
        lambda r: r.update(more=1),
        lambda r: r["summary"].update(status="fine"),
        lambda r: r["measures"].pop(),
        lambda r: r["weights"]["layers"][0].update(relative="much"),
    ):
        broken = json.loads(json.dumps(report))
        change(broken)
        assert not validator.is_valid(broken)
    assert math.isfinite(report["weights"]["layers"][0]["relative"])
