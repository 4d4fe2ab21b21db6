"""What a run may take for its own, what it may replace, and what makes its saved state go."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import refusal
from expunge.errors import InputError, Interrupted, NothingKept, RunError
from expunge.runs.keeping import plain_errors
from expunge.runs.scratch import Scratch, check_output, scratch_beside
from expunge.training.stopping import StopRequest

ASKED = {"inputs": {"model": "m"}}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begin(
    out: Path, *, resume: bool = False, overwrite: bool = False
) -> AbstractContextManager[Scratch]:
    return scratch_beside(out, ASKED, resume=resume, overwrite=overwrite)


def finish(scratch: Scratch) -> None:
    """What a run leaves for `publish`."""
    (scratch.output / "model.safetensors").write_text("weights")
    record = {"output_sha256": {"model.safetensors": ""}}
    (scratch.output / "expunge.json").write_text(json.dumps(record))


def run(out: Path, **options: Any) -> None:
    with begin(out, **options) as scratch:
        finish(scratch)
        scratch.publish()


def publish(
    out: Path, meanwhile: Callable[[], object], *, resume: bool = False, overwrite: bool = False
) -> None:
    """A run during which something happens."""
    with begin(out, resume=resume, overwrite=overwrite) as scratch:
        finish(scratch)
        scratch.mark("cache")
        meanwhile()
        scratch.publish()


def fail(out: Path, fault: BaseException) -> None:
    """A run with something saved, and a fault."""
    with begin(out) as scratch, plain_errors(scratch, StopRequest()):
        scratch.mark("cache")
        raise fault


def left(out: Path, fault: BaseException) -> Path:
    """The directory of a run that ended so."""
    with pytest.raises(type(fault)):
        fail(out, fault)
    return Scratch(out).root


def test_a_link_in_the_place_of_the_scratch_is_not_followed(out: Path, tmp_path: Path) -> None:
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "run.json").write_text('{"format": 2}')
    Scratch(out).root.symlink_to(tmp_path / "users")
    for options in ({"resume": True}, {"overwrite": True}, {}):
        assert "move it away" in refusal(partial(run, out, **options))
    assert [path.name for path in (tmp_path / "users").iterdir()] == ["run.json"]


def test_a_directory_that_no_run_made_is_not_emptied(out: Path) -> None:
    root = Scratch(out).root
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    for options in ({"resume": True}, {"overwrite": True}, {}):
        assert "move it away" in refusal(partial(run, out, **options))
    assert (root / "thesis.txt").read_text() == "mine"


def test_a_lock_that_is_a_link_is_refused(out: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    root = left(out, Interrupted("", 130))
    (root / "lock").unlink()
    (root / "lock").symlink_to(tmp_path / "thesis.txt")
    assert "is a link" in refusal(lambda: run(out, resume=True))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_directory_that_others_could_write_into_is_refused(out: Path) -> None:
    root = left(out, Interrupted("", 130))
    root.chmod(0o777)
    assert "move it away" in refusal(lambda: run(out, resume=True))
    root.chmod(0o700)
    run(out, resume=True)
    assert not root.exists()


@pytest.mark.parametrize("name", ["thesis.txt", "rows.jsonl", "README.md", "subdirectory"])
def test_an_output_with_files_of_the_users_is_not_replaced(name: str, out: Path) -> None:
    run(out)
    run(out, overwrite=True)
    (out / "scores.json").touch()  # what evaluate put there
    (out / name).write_text("mine")
    assert f"holds {name}" in refusal(lambda: run(out, overwrite=True))
    assert (out / name).read_text() == "mine"


def test_a_card_that_a_report_alone_wrote_goes_with_the_run(out: Path) -> None:
    from expunge.reporting.model_card import with_section

    run(out)
    card = out / "README.md"
    card.write_text(with_section("", "numbers", card))
    check_output(out, overwrite=True)
    card.write_text(with_section("My model", "numbers", card))
    assert "holds README.md" in refusal(lambda: check_output(out, overwrite=True))


def test_an_output_that_is_a_link_is_refused_at_the_start(out: Path, tmp_path: Path) -> None:
    for target in ("nowhere", "real"):
        (tmp_path / "real").mkdir(exist_ok=True)
        out.unlink(missing_ok=True)
        out.symlink_to(target)
        assert "is a link" in refusal(lambda: check_output(out, overwrite=True))
        assert "is a link" in refusal(lambda: run(out))


def test_what_appears_at_the_output_meanwhile_is_not_replaced(out: Path) -> None:
    def appear() -> None:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")

    with pytest.raises(RunError, match="made or changed by others"):
        publish(out, appear)
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "thesis.txt").unlink()
    out.rmdir()
    with pytest.raises(RunError, match="made or changed by others"):
        publish(out, lambda: out.write_text("mine"), resume=True)
    assert out.read_text() == "mine"
    out.unlink()
    publish(out, lambda: None, resume=True)  # the work was not lost
    assert (out / "model.safetensors").exists()


def test_an_output_that_changed_meanwhile_is_not_replaced(out: Path) -> None:
    run(out)
    mine = out / "thesis.txt"
    with pytest.raises(RunError, match="made or changed"):
        publish(out, lambda: mine.write_text("mine"), overwrite=True)
    assert mine.read_text() == "mine"
    assert (out / "expunge.json").is_file()
    mine.unlink()
    publish(out, lambda: None, overwrite=True, resume=True)
    assert not Scratch(out).root.exists()


@pytest.mark.parametrize(
    "fault",
    [
        InputError("m: no such model directory"),
        RunError("m: ends before its tensors do"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "m"),
        OSError(errno.ESTALE, "Stale file handle", "m"),
        OSError(errno.EFBIG, "File too large", "m"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_only_success_and_a_request_delete_state(fault: Exception, out: Path) -> None:
    with pytest.raises(Interrupted, match="the cache is kept: go on with") as caught:
        fail(out, fault)
    assert caught.value.exit_code == (2 if isinstance(fault, InputError) else 1)
    with begin(out, resume=True) as scratch:
        assert scratch.is_marked("cache")
        finish(scratch)
        scratch.publish()
    assert not Scratch(out).root.exists()


def test_a_run_that_can_have_no_result_leaves_nothing(out: Path, tmp_path: Path) -> None:
    root = left(out, NothingKept("no checkpoint can be kept"))
    assert not root.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_the_old_state_is_emptied_mixes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expunge.runs import scratch as module

    root = left(out, Interrupted("", 130))
    (root / "output" / "model.safetensors").touch()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "remove", killed)
        with pytest.raises(KeyboardInterrupt), begin(out, overwrite=True):
            pass
    with begin(out, resume=True) as again:
        assert not again.is_marked("cache")
        assert list(again.output.iterdir()) == []


def test_the_output_has_the_mode_of_the_umask(out: Path) -> None:
    before = os.umask(0o077)
    try:
        run(out)
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o700


def test_a_result_is_as_closed_as_the_target(tmp_path: Path) -> None:
    from expunge.models.files import ModelFiles
    from expunge.models.writing import close_as

    for directory, shard, made in (
        (0o755, 0o600, 0o600),
        (0o700, 0o644, 0o644),
        (0o755, 0o640, 0o640),
    ):
        model, out = tmp_path / "model", tmp_path / "out"
        model.mkdir(exist_ok=True)
        (out / "adapter").mkdir(parents=True, exist_ok=True)
        for path in (model / "m.safetensors", out / "m.safetensors", out / "adapter" / "a"):
            path.touch()
            path.chmod(0o644)
        out.chmod(0o755)
        (model / "m.safetensors").chmod(shard)
        model.chmod(directory)
        close_as(ModelFiles(model, (model / "m.safetensors",), {}, model), out)
        assert out.stat().st_mode & 0o777 == directory
        for path in (out / "m.safetensors", out / "adapter" / "a"):
            assert path.stat().st_mode & 0o777 == made


def test_a_run_that_was_killed_as_it_began_to_write_is_gone_on_with(tmp_path: Path) -> None:
    output = tmp_path / "out"
    root = tmp_path / ".out.unfinished"
    root.mkdir(mode=0o700)
    for name in ("lock", ".expunge-0123456789abcdef"):
        (root / name).touch()
    with scratch_beside(output, {"seed": 1}, resume=True, overwrite=False) as scratch:
        assert not list(scratch.root.glob(".expunge-*"))
