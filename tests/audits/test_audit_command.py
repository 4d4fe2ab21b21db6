"""`expunge audit` end to end on tiny models: results, files, privacy, resume, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from expunge.audits import auditing, budgets, inputs
from expunge.audits.base import Attack, Case, Found
from expunge.audits.budgets import Budget
from expunge.audits.catalog import ATTACKS

Cli = Callable[..., tuple[int, str, str]]
SCHEMA = Path(auditing.__file__).with_name("audit.schema.json")
SMALL = Budget(
    facts=None, retain=8, nonmembers=None, tokens=24, steps=6, measures=2, tuning_rows=4, folds=2,
    samples=3, layers=2, resamples=50, rates=(1.0, 3.0), lora=True, apart=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for module in (auditing, inputs, budgets):
        monkeypatch.setattr(module, "BUDGETS", {"quick": SMALL})


@pytest.fixture
def texts(
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
    nonmember_rows: list[dict[str, str]],
) -> list[str]:
    """What no file may hold: whole columns, and what is special in the answers."""
    rows = forget_rows + retain_rows + nonmember_rows
    whole = [row[column] for row in rows for column in ("input", "output")]
    return whole + [word for row in rows for word in re.findall(r"90\d-\S+", row["output"])]


@pytest.fixture
def audit(
    run_cli: Cli, memorised_dir: Path, oracle_dir: Path, row_files: dict[str, Path]
) -> Callable[..., tuple[int, str, str]]:
    def call(model: Path, *options: object, oracle: bool = True) -> tuple[int, str, str]:
        return run_cli(
            *("audit", model, "--original", memorised_dir, "--forget", row_files["forget"]),
            *("--retain", row_files["retain"], "--device", "cpu"),
            *(("--oracle", oracle_dir) if oracle else ()),
            *options,
        )

    return call


def schema() -> Any:
    """Validates against the published schema."""
    jsonschema = pytest.importorskip("jsonschema", reason="is in the extra dev")
    published = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(published)
    return jsonschema.Draft202012Validator(published)


def every_file(directory: Path) -> str:
    return "\n".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in directory.rglob("*")
        if path.is_file()
    )


@pytest.mark.slow
def test_an_unchanged_model_is_not_forgotten_and_nothing_tells_what_it_knew(
    audit: Cli,
    nudged_dir: Path,
    row_files: dict[str, Path],
    texts: list[str],
    forget_rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    output = tmp_path / "audit.json"
    code, out, err = audit(nudged_dir, "--nonmembers", row_files["nonmembers"], "--output", output)
    assert code == 0, err
    report = json.loads(output.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["audit.json"]
    assert report["verdict"]["verdict"] == "not forgotten"
    (request,) = report["requests"]
    assert set(request["attacks"]) == set(ATTACKS)
    assert request["kept"]["value"] == pytest.approx(1.0)
    ids = {row["id"] for row in forget_rows}
    for name in ("direct", "sample", "verbatim"):
        attack = request["attacks"][name]
        assert attack["power"]["has_power"], attack["sentence"]
        assert attack["recovered"]["against"] == "oracle"
        assert attack["recovered"]["value"] == pytest.approx(1.0)
        assert attack["models"]["target"]["extracted"]["value"] == pytest.approx(1.0)
        assert attack["models"]["oracle"]["extracted"]["value"] <= 0.5  # continuations share a pattern
        assert {row["id"] for row in attack["rows"]} <= ids
    # What asking in other ways gets from this target is too little to say anything of another model.
    paraphrase = request["attacks"]["paraphrase"]
    assert paraphrase["models"]["target"]["variants"]["input"]["extracted"]["value"] == 1.0
    if not paraphrase["power"]["has_power"]:
        assert paraphrase["recovered"] is None
    benign = request["attacks"]["benign"]["models"]["target"]
    rates = {f"{name}, step {step}" for name in ("rate x1", "rate x3", "LoRA") for step in (3, 6)}
    assert set(benign["variants"]) == {"step 0", *rates}
    assert set(benign["control"]) == {"step 0", *(name for name in rates if name.endswith("6"))}
    assert benign["extracted"]["value"] <= benign["variants"]["step 0"]["extracted"]["value"] == 1.0
    assert request["attacks"]["membership"]["models"]["target"]["variants"]["loss"]["auc"]
    assert request["attacks"]["sample"]["models"]["target"]["numbers"]["leak_at_k"]
    for held_out in request["attacks"]["relearn"]["models"].values():
        parts = {f"{name} only, step {n}" for name in ("questions", "documents") for n in (3, 6)}
        assert set(held_out["variants"]) == rates | parts
        # Two folds measure every fact, and every retain row.
        assert {each["rows"] for each in held_out["variants"].values()} == {8}
        assert {each["rows"] for each in held_out["control"].values()} == {8}
    # Neither the file nor what was printed tells a word of any row.
    for place in (output.read_text(), out, err):
        assert [text for text in texts if text in place] == []
    assert "Verdict: not forgotten: " in out
    for attack in request["attacks"].values():
        assert attack["sentence"] in out
        assert attack["sentence"].endswith(".")
    if find_spec("jsonschema"):  # else the next test says that it is missing
        schema().validate(report)


def test_the_report_fits_its_schema(
    audit: Cli, nudged_dir: Path, row_files: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "audit.json"
    code, out, _ = audit(
        nudged_dir, "--nonmembers", row_files["nonmembers"], "--output", output,
        "--earlier", row_files["forget"], "--reveal", "--json", "--quiet",
        "--attacks", "sample,membership,trigger",
    )  # fmt: skip
    report = json.loads(out)
    assert (code, report) == (0, json.loads(output.read_text()))
    validator = schema()
    validator.validate(report)
    assert len(report["requests"]) == 2
    for change in (
        lambda r: r.pop("verdict"),
        lambda r: r.update(more=1),
        lambda r: r["verdict"].update(verdict="fine"),
        lambda r: r["requests"][0]["attacks"]["direct"]["rows"][0].update(text="x"),
        lambda r: r["requests"][0]["attacks"]["direct"]["recovered"].pop("against"),
    ):
        broken = json.loads(out)
        change(broken)
        assert not validator.is_valid(broken)


def test_text_is_shown_only_when_asked(
    audit: Cli, nudged_dir: Path, forget_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    output = tmp_path / "audit.json"
    code, out, err = audit(nudged_dir, "--attacks", "direct", "--output", output, "--reveal")
    assert code == 0
    shown = json.loads(output.read_text())["requests"][0]["attacks"]["direct"]["texts"]
    for row in forget_rows:
        assert shown["target"]["input"][row["id"]].strip() == row["output"]
        assert row["output"] not in out + err


def test_a_destroyed_model_is_told_from_a_forgetful_one(
    audit: Cli, ruined_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "audit.json"
    assert audit(ruined_dir, "--attacks", "direct,verbatim", "--output", output)[0] == 0
    report = json.loads(output.read_text())
    assert report["verdict"]["verdict"] == "destroyed"
    assert report["requests"][0]["kept"]["value"] < 0.5
    assert report["requests"][0]["attacks"]["direct"]["recovered"]["value"] < 0.5


def test_a_model_that_answers_no_numbers_is_destroyed_and_its_report_is_json(
    audit: Cli,
    memorised_dir: Path,
    saved: Callable[[str, Any], Path],
    row_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32)
    model.get_input_embeddings().weight.data.mul_(1e37)
    output = tmp_path / "audit.json"
    code, _, err = audit(
        saved("nan", model), "--nonmembers", row_files["nonmembers"], "--output", output,
        "--attacks", "sample,verbatim,membership,ablate,latent", oracle=False,
    )  # fmt: skip
    assert code == 0, err

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    report = json.loads(output.read_text(), parse_constant=refuse)
    if find_spec("jsonschema"):
        schema().validate(report)
    assert report["verdict"]["verdict"] == "destroyed"
    probe = report["requests"][0]["attacks"]["latent"]["models"]["unlearned"]["numbers"]
    assert set(probe["probe_accuracy"].values()) == {None}


def test_without_an_oracle_the_floor_is_said_to_be_0(
    audit: Cli, nudged_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "audit.json"
    code, out, _ = audit(nudged_dir, "--attacks", "direct", "sample", "--output", output, oracle=False)
    report = json.loads(output.read_text())
    assert code == 0
    assert set(report["models"]) == {"target", "unlearned"}
    assert report["requests"][0]["attacks"]["direct"]["recovered"]["against"] == "zero"
    assert "against 0, no oracle was given" in out
    assert report["requests"][0]["not_run"]["quantize"] == "--attacks leaves it out"


def test_an_attack_that_fails_on_the_target_claims_nothing(
    run_cli: Cli,
    memorised_dir: Path,
    oracle_dir: Path,
    row_files: dict[str, Path],
    forget_rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    """The models are given the wrong way round: what the oracle never knew cannot be recovered."""
    output = tmp_path / "audit.json"
    questions = [row for row in forget_rows if row["id"].endswith("qa0")]
    forget = write_jsonl(tmp_path / "questions.jsonl", questions)
    code, out, _ = run_cli(
        *("audit", memorised_dir, "--original", oracle_dir, "--forget", forget),
        *("--retain", row_files["retain"], "--attacks", "direct", "--output", output),
    )
    attack = json.loads(output.read_text())["requests"][0]["attacks"]["direct"]
    assert code == 0
    assert attack["power"]["has_power"] is False
    assert attack["recovered"] is None
    assert "no power here, so no claim: it gets 0% of the facts from the target" in out
    assert "Verdict: none: no attack had power on the target" in out


@pytest.mark.slow
def test_neither_the_batch_size_nor_a_second_run_changes_a_byte(
    audit: Cli, nudged_dir: Path, row_files: dict[str, Path], tmp_path: Path
) -> None:
    reports = []
    for number, batch_size in enumerate((64, 3)):
        output = tmp_path / f"{number}.json"
        options = (
            "--nonmembers",
            row_files["nonmembers"],
            "--batch-size",
            batch_size,
            "--attacks",
            "paraphrase,sample,verbatim,membership,ablate,latent,relearn",
        )
        assert audit(nudged_dir, *options, "--output", output, oracle=False)[0] == 0
        reports.append(output.read_bytes())
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_an_interrupted_audit_goes_on_where_it_was(
    audit: Cli, nudged_dir: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[str, str]] = []
    names = ("direct", "verbatim", "quantize")

    def counted(attack: Attack, fail_at: int) -> Attack:
        def run(subject: Any, case: Case, advance: Any) -> Found:
            if len(runs) == fail_at:
                raise KeyboardInterrupt
            runs.append((subject.name, attack.name))
            return attack.run(subject, case, advance)

        return Attack(**{**vars(attack), "run": run})

    options = ("--attacks", *names, "--output")
    assert audit(nudged_dir, *options, tmp_path / "whole.json")[0] == 0
    output, partial = tmp_path / "audit.json", tmp_path / "audit.json.partial"
    for fail_at in (4, 99):
        changed = {name: counted(ATTACKS[name], fail_at) for name in names}
        monkeypatch.setattr(inputs, "ATTACKS", changed)
        code, _, _ = audit(nudged_dir, *options, output)
        if fail_at == 4:
            assert (code, output.exists()) == (130, False)
            assert len(list(partial.iterdir())) == 4
            assert partial.stat().st_mode & 0o077 == 0
            found = every_file(partial)
            assert [text for text in texts if text in found] == []
            # One of them is cut off, as by a full disk: it is measured again.
            cut = next(partial.glob("verbatim-target-*"))
            cut.write_text(cut.read_text()[:100])
    assert code == 0
    assert len(runs) == 4 + (9 - 4) + 1
    assert runs[4] == ("target", "verbatim")
    whole = json.loads((tmp_path / "whole.json").read_text())
    report = json.loads(output.read_text())
    for each in (whole, report):  # the replaced catalogue knows no others to leave out
        each["requests"][0].pop("not_run")
    assert report == whole
    assert not partial.exists()


def test_another_seed_or_file_uses_nothing_of_an_earlier_audit(
    audit: Cli, nudged_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(subject: Any, case: Case, advance: Any) -> Found:
        ran.append(subject.name)
        if len(ran) % 2 == 0:
            raise KeyboardInterrupt
        return ATTACKS["direct"].run(subject, case, advance)

    attack = Attack(**{**vars(ATTACKS["direct"]), "run": run})
    monkeypatch.setattr(inputs, "ATTACKS", {"direct": attack})
    output = tmp_path / "audit.json"
    for options in ((), ("--seed", 1), ("--dtype", "bfloat16"), ("--learning-rate", 0.1)):
        assert audit(nudged_dir, *options, "--output", output, oracle=False)[0] == 130
    assert ran == ["target", "unlearned"] * 4


@pytest.mark.slow
def test_target_and_oracle_are_attacked_once_for_many_audits(
    audit: Cli, nudged_dir: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("direct", "verbatim")
    runs: list[tuple[str, str]] = []

    def counted(attack: Attack) -> Attack:
        def run(subject: Any, case: Case, advance: Any) -> Found:
            runs.append((subject.name, attack.name))
            return attack.run(subject, case, advance)

        return Attack(**{**vars(attack), "run": run})

    monkeypatch.setattr(inputs, "ATTACKS", {name: counted(ATTACKS[name]) for name in names})
    cache, without, with_cache = tmp_path / "kept", tmp_path / "w.json", tmp_path / "c.json"
    assert audit(nudged_dir, "--output", without)[0] == 0
    assert len(runs) == 6
    assert audit(nudged_dir, "--output", with_cache, "--cache", cache)[0] == 0
    assert len(runs) == 12
    assert with_cache.read_bytes() == without.read_bytes()
    assert {path.name.split("-")[1] for path in cache.iterdir()} == {"target", "oracle"}
    for path in (cache, *cache.iterdir()):
        assert path.stat().st_mode & 0o077 == 0
    found = every_file(cache)
    assert [text for text in texts if text in found] == []

    with_cache.unlink()
    assert audit(nudged_dir, "--output", with_cache, "--cache", cache)[0] == 0
    assert runs[12:] == [("unlearned", "direct"), ("unlearned", "verbatim")]
    assert with_cache.read_bytes() == without.read_bytes()
    assert audit(nudged_dir, "--seed", 1, "--output", with_cache, "--cache", cache)[0] == 0
    assert len(runs) == 14 + 6
    # What other code measured is measured again.
    monkeypatch.setattr(auditing, "_code", lambda: "changed")
    assert audit(nudged_dir, "--output", with_cache, "--cache", cache)[0] == 0
    assert len(runs) == 20 + 6


def test_a_cache_keeps_no_text_and_needs_a_place(audit: Cli, nudged_dir: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "audit.json", tmp_path / "file"
    file.write_text("")
    for options, part in (
        (("--cache", tmp_path / "kept", "--reveal"), "--cache: keeps no text"),
        (("--cache", file), "is a file"),
        (("--cache", tmp_path / "no" / "kept"), "does not exist"),
    ):
        code, _, err = audit(nudged_dir, "--output", output, *options)
        assert code == 2
        assert part in err
    assert not (tmp_path / "kept").exists()


def test_earlier_requests_are_audited_again(
    audit: Cli, nudged_dir: Path, tmp_path: Path, forget_rows: list[dict[str, str]]
) -> None:
    earlier = write_jsonl(
        tmp_path / "first.jsonl", [{**row, "id": f"e{row['id']}"} for row in forget_rows[:4]]
    )
    output = tmp_path / "audit.json"
    code, out, _ = audit(nudged_dir, "--attacks", "direct", "--earlier", earlier, "--output", output)
    assert code == 0
    first, second = json.loads(output.read_text())["requests"]
    assert first["audited"]["rows"] == 8
    assert second["audited"]["rows"] == 4
    assert second["forget"]["source"] == earlier.name
    assert {row["id"][0] for row in second["attacks"]["direct"]["rows"]} == {"e"}
    assert "Verdict over all requests: not forgotten" in out


def test_paraphrases_ask_the_facts_that_they_reword(
    audit: Cli, nudged_dir: Path, tmp_path: Path, forget_rows: list[dict[str, str]]
) -> None:
    questions = [row for row in forget_rows if row["id"].endswith("qa0")]
    # The same words, so that the model must know the answer.
    rows: list[Any] = [
        {"id": f"p{n}", "of": row["id"], "input": row["input"], "output": row["output"]}
        for n, row in enumerate(questions)
    ]
    rows.append({"id": "px", "of": "a retain row", "input": "x", "output": "y"})
    path, output = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "audit.json"
    options = ("--attacks", "paraphrase", "--output", output, "--paraphrases")
    assert audit(nudged_dir, *options, path)[0] == 0
    attack = json.loads(output.read_text())["requests"][0]["attacks"]["paraphrase"]
    found = attack["models"]["unlearned"]["variants"]["paraphrase 1"]
    assert found["rows"] == len(questions)
    assert found["extracted"]["value"] == 1.0
    choice = attack["models"]["unlearned"]["numbers"]["multiple_choice"]
    assert choice == {"questions": 4, "accuracy": 1.0, "chance": 0.25}
    nothing = write_jsonl(tmp_path / "n.jsonl", rows[-1:])
    code, _, err = audit(nudged_dir, *options, nothing)
    assert code == 2
    assert "rewords no row of" in err
    no_owner = write_jsonl(tmp_path / "o.jsonl", [{"input": "x", "output": "y"}])
    code, _, err = audit(nudged_dir, *options, no_owner)
    assert code == 2
    assert "line 1: has no column 'of'" in err


REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "attack": (("--attacks", "relern"), "--attacks relern: unknown; choose from direct"),
    "no nonmembers": (("--attacks", "membership"), "give --nonmembers"),
    "batch": (("--batch-size", "0"), "--batch-size 0: must be 1 or more"),
    "rate": (("--learning-rate", "-1"), "--learning-rate -1: must be a number above 0"),
    "reveal": (("--reveal",), "--reveal: adds text to audit.json; give --output FILE"),
    "benign": (("--attacks", "direct", "--benign", "x"), "--benign: is for the attack benign"),
    "tuning": (("--attacks", "direct", "--tuning", "lora"), "--tuning: is for the attacks relearn"),
    "paraphrases": (
        ("--attacks", "direct", "--paraphrases", "x"),
        "--paraphrases: is for the attack paraphrase",
    ),
    "budget": (("--budget", "huge"), "huge"),
    "output": (("--output", "no/where.json"), "its directory does not exist; make it first"),
    "target": (("--oracle", "{target}"), "has the same weights as --original"),
    "overlap": (("--nonmembers", "{forget}"), "hold the same rows"),
    "benign rows": (("--benign", "{forget}"), "hold the same rows"),
    "earlier": (("--earlier", "{retain}"), "hold the same rows"),
    "dtype": (("--dtype", "int8"), "int8"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_input_is_refused_before_a_model_is_loaded(
    case: str,
    audit: Cli,
    nudged_dir: Path,
    memorised_dir: Path,
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from expunge.audits import subject

    monkeypatch.setattr(subject, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    options, message = REFUSALS[case]
    names = {"target": memorised_dir, **row_files}
    given = [option.format(**names) for option in options]
    code, out, err = audit(nudged_dir, *given, oracle=False)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_one_model_given_twice_and_models_of_two_families_are_refused(
    audit: Cli, memorised_dir: Path, tmp_path: Path
) -> None:
    code, _, err = audit(memorised_dir, oracle=False)
    assert code == 2
    assert "has the same weights as --original" in err
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(memorised_dir)
    tokenizer.add_tokens(["<new>"])
    AutoModelForCausalLM.from_pretrained(memorised_dir).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, err = audit(tmp_path, oracle=False)
    assert code == 2
    assert "its tokenizer is not that of --original" in err


def test_the_help_names_every_attack_and_several_processes_are_refused(
    run_cli: Cli, monkeypatch: pytest.MonkeyPatch, audit: Cli, nudged_dir: Path
) -> None:
    code, out, _ = run_cli("audit", "--help")
    assert code == 0
    words = re.findall(r"[\w-]+", out)
    assert not {*ATTACKS, "--original"} - set(words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = audit(nudged_dir)
    assert code == 2
    assert "start it without accelerate launch" in err


def test_the_docs_name_every_attack_field_and_the_schema(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "audits.md").read_text(encoding="utf-8")
    for name, attack in ATTACKS.items():
        assert f"`{name}`" in docs
        for reference in re.findall(r"\d{4}\.\d{5}", attack.reference):
            assert reference in docs
    assert "audit.schema.json" in docs
