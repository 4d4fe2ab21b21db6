"""Files are whole or as they were, closed where they were closed, and nobody else's."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from conftest import refusal
from expunge import disk
from expunge.disk import (
    check_file_output,
    check_not_read,
    check_writable,
    check_written,
    deliver,
    held,
    made,
    own,
    remove,
    write_whole,
)
from expunge.errors import InputError, RunError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def fails(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.json"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", fails(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_whole(path, "after")
    assert "; " in disk.explained(caught.value)  # with a mend
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.json"]


def test_a_limit_on_file_sizes_is_no_fault_of_the_program(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="large") as caught:
            write_whole(tmp_path / "big", b"0" * 2000)
        message = refusal(lambda: check_writable(tmp_path / "new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f" in disk.explained(caught.value)
    assert "(File too large); raise the limit" in message
    assert list(tmp_path.iterdir()) == []


def test_modes_are_those_of_the_umask_of_what_was_there_or_of_the_owner(
    tmp_path: Path, umask: Callable[[int], int]
) -> None:
    path = tmp_path / "a"
    write_whole(path, "")
    assert mode(path) == 0o644
    path.chmod(0o600)
    write_whole(path, "again")
    assert mode(path) == 0o600
    write_whole(tmp_path / "b", "", private=True)
    assert mode(tmp_path / "b") == 0o600
    path.chmod(0o644)
    write_whole(path, "text", private=True)
    assert mode(path) == 0o600
    umask(0o077)
    write_whole(tmp_path / "c", "")
    assert mode(tmp_path / "c") == 0o600


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"
    write_whole(Path(os.devnull), "x")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_a_result_whose_place_is_lost_is_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()  # made while the work was done
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = tmp_path / "away" / "records.jsonl"
    files = {tmp_path / "taken": "scores", gone: "secret", tmp_path / "good": "good"}
    monkeypatch.chdir(tmp_path / "taken")
    with pytest.raises(RunError) as caught:
        deliver(files)
    assert (tmp_path / "good").read_text() == "good"
    (beside,) = tmp_path.glob("taken-*")
    (here,) = (tmp_path / "taken").glob("records-*.jsonl")
    assert beside.read_text() == "scores"
    assert here.read_text() == "secret"
    assert mode(here) == 0o600
    assert str(beside) in str(caught.value)
    assert str(here) in str(caught.value)


def test_an_output_is_only_replaced_where_its_option_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(path: Path, **read: str) -> None:
        check_file_output("output", path, read, lambda text: text.startswith("{"))

    check(tmp_path / "new")
    (tmp_path / "new").touch()
    check(tmp_path / "new")  # empty, as mktemp makes it
    (tmp_path / "new").write_text("{}")
    check(tmp_path / "new")
    check(Path(os.devnull))
    with closing(socket.socket(socket.AF_UNIX)) as end:
        end.bind(str(tmp_path / "socket"))
    assert "is a socket; name a file" in refusal(lambda: check(tmp_path / "socket"))
    (tmp_path / "circle").symlink_to("circle")
    assert "leads to itself" in refusal(lambda: check(tmp_path / "circle"))
    (tmp_path / "deep").write_text("[" * 20_000)
    with pytest.raises(InputError, match="not written by this option"):
        check_file_output("output", tmp_path / "deep", {}, json.loads)
    other = tmp_path / "thesis.txt"
    other.write_text("mine")
    assert "not written by this option" in refusal(lambda: check(other))
    other.write_bytes(b"\xff{")
    assert "not written by this option" in refusal(lambda: check(other))
    (tmp_path / "same").hardlink_to(tmp_path / "new")
    assert "what --forget reads" in refusal(
        lambda: check(tmp_path / "same", forget=str(tmp_path / "new"))
    )
    (tmp_path / "link").symlink_to("nowhere/x")
    assert "does not exist" in refusal(lambda: check(tmp_path / "link"))
    assert "is a directory" in refusal(lambda: check(tmp_path))
    assert "a link to nothing" in refusal(lambda: check_writable(tmp_path / "link", inside=True))
    monkeypatch.setattr(tempfile, "TemporaryFile", fails(errno.EROFS))
    assert "Read-only file system" in refusal(lambda: check(tmp_path / "new"))


def test_what_is_read_is_found_in_an_output_by_every_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "model.safetensors").touch()
    farm = tmp_path / "farm"
    farm.mkdir()
    (farm / "model.safetensors").symlink_to(out / "deep" / "model.safetensors")
    (tmp_path / "alias").symlink_to(out)
    for model in (out, out / "deep", farm, tmp_path / "alias", out / ".." / "out" / "deep"):
        read = {"model": str(model)}
        message = refusal(partial(check_not_read, "--output", out, read))
        assert "what --model reads" in message
    check_not_read("--output", out, {"model": str(tmp_path), "forget": None, "hub": "a/b"})


def test_a_directory_of_our_own_is_proved(
    tmp_path: Path, umask: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_ours(path: Path) -> bool:
        return (path / "mark").exists()

    made = tmp_path / "made"
    own(made, is_ours)
    assert mode(made) == 0o700
    (made / "mark").touch()
    own(made, is_ours)
    made.chmod(0o777)  # others may have put something in
    assert "not made by this command" in refusal(lambda: own(made, is_ours))
    users = tmp_path / "users"
    users.mkdir()
    own(users, is_ours)  # empty, so that nothing can be lost or found
    assert mode(users) == 0o700
    (users / "thesis.txt").touch()
    assert "move it away" in refusal(lambda: own(users, is_ours))
    made.chmod(0o700)
    (tmp_path / "link").symlink_to(made)
    assert "move it away" in refusal(lambda: own(tmp_path / "link", is_ours))
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "move it away" in refusal(lambda: own(tmp_path / "dangling", is_ours))
    (tmp_path / "file").touch()
    assert "move it away" in refusal(lambda: own(tmp_path / "file", is_ours))
    if os.geteuid() == 0:
        os.chown(made, 12345, 12345)
        assert "move it away" in refusal(lambda: own(made, is_ours))
    assert not list(tmp_path.glob(".expunge-*"))


def test_a_lock_that_is_a_link_changes_nothing_behind_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "lock").symlink_to("thesis.txt")

    def hold(path: Path) -> None:
        with held(path, "somebody is at work"):
            pass

    assert "is a link" in refusal(lambda: hold(tmp_path / "lock"))
    hold(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with held(tmp_path / "other", ""):
        assert "somebody is at work" in refusal(lambda: hold(tmp_path / "other"))


def test_a_new_directory_goes_again_if_nothing_came_of_it(tmp_path: Path) -> None:
    def fail(path: Path, *names: str) -> None:
        with made(path):
            for name in names:
                (path / name).touch()
            raise RunError

    for path, names in ((tmp_path / "empty", ()), (tmp_path / "full", ("x",))):
        with pytest.raises(RunError):
            fail(path, *names)
        assert path.exists() == bool(names)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError):
        fail(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_removing_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").touch()
    (tmp_path / "link").symlink_to("kept")
    remove(tmp_path / "link")
    remove(tmp_path / "missing")
    assert (tmp_path / "kept" / "thesis.txt").exists()
    remove(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_what_others_put_beside_ours_is_named(tmp_path: Path) -> None:
    for name in ("study.db", "trial-1.yaml", "thesis.txt", "[x]"):
        (tmp_path / name).touch()
    message = refusal(lambda: check_written("--output", tmp_path, ("study.db", "trial-*.yaml")))
    assert "holds [x] and 1 more" in message
    check_written("--output", tmp_path, ("study.db", "trial-*", "*.txt", "[[]x]"))
