"""What `expunge view` refuses before a model is loaded: one line, exit code 2, and what to do."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import refusal, write_jsonl
from expunge.models import loading
from expunge.runs.sources import remembered
from expunge.web import serving
from expunge.web.inputs import (
    PASSWORD,
    ViewInputs,
    check,
    is_loopback,
    listening,
    read_password,
    same_password,
)

Cli = Callable[..., tuple[int, str, str]]
pytest.importorskip("gradio", reason="is in the extra web")


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_model", loads)
    monkeypatch.setattr(serving, "load_model", loads)
    monkeypatch.delenv(PASSWORD, raising=False)


def test_what_is_read_and_found_right(served: dict[str, Path]) -> None:
    checked = check(ViewInputs(str(served["run"]), forget=str(served["forget"]), port=0, device="cpu"))
    assert set(checked.rows) == {"forget"}
    assert checked.password is None
    # Scores that lie where expunge leaves them are found.
    assert [card.role for card in checked.material.cards] == ["target", "unlearned"]
    assert not checked.chat_template
    assert set(remembered(served["run"])["sources"]) == {"original", "forget", "retain"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"run": "nowhere"}, "nowhere: no such run directory"),
        ({"port": 70000}, "--port 70000: must be from 0 to 65535"),
        ({"reveal": True}, "--reveal: shows the text of the rows; give --forget FILE"),
        ({"original": "nowhere"}, "nowhere: no such model directory"),
        ({"device": "abacus"}, "--device abacus: unknown"),
        ({"chat_template": "on"}, "has none; give off"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0: other machines could reach the page"),
        ({"password_file": "nowhere"}, "--password-file nowhere: No such file"),
    ],
)
def test_wrong_options_are_refused(served: dict[str, Path], given: dict[str, Any], told: str) -> None:
    values = {"run": str(served["run"]), "port": 0, "device": "cpu", **given}
    assert told in refusal(lambda: check(ViewInputs(**values)))


def test_rows_that_are_not_the_runs_are_refused(
    served: dict[str, Path], forget_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", forget_rows)
    told = refusal(lambda: check(ViewInputs(str(served["run"]), forget=str(other))))
    assert f"--forget {other}: is not the forget set of this run" in told


def test_a_target_that_is_another_model_is_refused(
    served: dict[str, Path], model_dir: Callable[[str], Path], nudged_dir: Path
) -> None:
    for other in (nudged_dir, served["run"]):
        told = refusal(lambda other=other: check(ViewInputs(str(served["run"]), str(other))))  # type: ignore[misc]
        assert f"--original {other}: model.safetensors is not that of the run's target" in told


def test_a_target_that_is_gone_names_the_option(served: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(served["run"], moved)
    manifest = json.loads((moved / "expunge.json").read_text())
    manifest["settings"]["inputs"]["model"] = str(tmp_path / "gone")
    (moved / "expunge.json").write_text(json.dumps(manifest))
    told = refusal(lambda: check(ViewInputs(str(moved))))
    assert "no such model directory" in told
    assert "--original DIR" in told


def test_a_run_that_is_not_finished_is_refused(served: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "expunge.json").write_text('{"status": "running"}')
    assert "is not complete" in refusal(lambda: check(ViewInputs(str(tmp_path))))


def test_the_password_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "password"
    path.write_text("of the file\nand no more\n")
    outside = {"run": "run", "host": "0.0.0.0"}
    assert read_password(ViewInputs(**outside, password_file=str(path))) == "of the file"  # type: ignore[arg-type]
    monkeypatch.setenv(PASSWORD, "of the environment")
    assert read_password(ViewInputs(**outside)) == "of the environment"  # type: ignore[arg-type]
    assert read_password(ViewInputs("run")) == "of the environment"
    assert read_password(ViewInputs("run", password_file=str(path))) == "of the file"
    for text, told in (("\nsecond", "holds 0 characters"), ("short", "holds 5 characters")):
        path.write_text(text)
        message = refusal(
            lambda: read_password(ViewInputs(**outside, password_file=str(path)))  # type: ignore[arg-type]
        )
        assert told in message
        assert "short" not in message.replace(str(path), "")
    for short, count in ((" ", 0), ("x", 1), ("seven  ", 5), ("1234567", 7)):
        monkeypatch.setenv(PASSWORD, short)
        assert refusal(lambda: read_password(ViewInputs("run"))) == (
            f"{PASSWORD}: holds {count} characters; a password has 8 or more"
        )


def test_a_directory_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current directory is gone" in refusal(lambda: check(ViewInputs("run")))


def test_no_option_takes_the_password_itself(run_cli: Cli) -> None:
    code, _, err = run_cli("view", "run", "--password", "secret")
    assert code == 2
    assert "did you mean --password-file?" in err


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True),
        ("0.0.0.0", False), ("::", False), ("192.168.0.4", False), ("example.org", False),
        ("localhost.example.org", False),
    ],
)  # fmt: skip
def test_which_addresses_are_of_this_machine_alone(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize("host", ["192.168..1", "no such host"])
def test_what_is_no_address_is_refused(host: str) -> None:
    assert f"--host {host}: is no address" in refusal(lambda: listening(host, 0))


def test_an_audit_that_makes_no_report_is_refused_before_a_model_is_loaded(
    served: dict[str, Path], tmp_path: Path
) -> None:
    manifest = json.loads((served["run"] / "expunge.json").read_text())
    models = {
        "target": {"sha256": manifest["model_sha256"]},
        "unlearned": {"sha256": manifest["output_sha256"]},
    }
    run = tmp_path / "run"
    shutil.copytree(served["run"], run)
    (tmp_path / manifest["settings"]["inputs"]["model"]).symlink_to(
        served["run"].parent / manifest["settings"]["inputs"]["model"]
    )
    (run / "audit.json").write_text(json.dumps({"format": "expunge-audit/1", "models": models}))
    told = refusal(lambda: check(ViewInputs(str(run), device="cpu")))
    assert "is not as expunge audit writes it" in told


def test_passwords_are_the_same_or_not() -> None:
    assert same_password("é漢", "é漢")
    assert not same_password("", "x")
    assert not same_password("x", "xx")


def test_a_port_in_use_is_found_before_a_model_is_loaded(served: dict[str, Path], run_cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = run_cli("view", served["run"], "--port", port, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(f"expunge: --host 127.0.0.1 --port {port}: cannot listen there")
    assert "no address" in refusal(lambda: listening("no.such.host.invalid", 0))


def test_without_gradio_the_mend_is_named(
    served: dict[str, Path], run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expunge.web.inputs.importlib.util.find_spec", lambda _: None)
    code, out, err = run_cli("view", served["run"], "--quiet")
    assert (code, out) == (2, "")
    assert err == (
        "expunge: view: needs gradio, which is not installed; run pip install '.[web]' in the clone"
        " of expunge\n"
    )


def test_several_processes_are_refused(
    served: dict[str, Path], run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run_cli("view", served["run"])
    assert code == 2
    assert "start it without accelerate launch" in err
