"""Hidden states on disk: nothing lost when pages are given back, and a full disk is an error."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path

import pytest
import torch

from expunge.segments import states
from expunge.segments.states import StateFile

WIDTH = 6


def random_states(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "states"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spans_come_back_one_after_the_other(path: Path, dtype: torch.dtype) -> None:
    whole = random_states(20, dtype)
    file = StateFile(path, 20, WIDTH, dtype)
    for start, end in ((12, 20), (0, 5), (5, 12)):
        file.write(start, whole[start:end])
    found = file.read([(3, 4), (0, 1), (15, 5), (3, 4)])
    assert found.dtype == dtype
    assert torch.equal(found, torch.cat([whole[3:7], whole[:1], whole[15:], whole[3:7]]))
    assert path.stat().st_size == 20 * WIDTH * dtype.itemsize


def test_states_are_rounded_to_the_files_dtype_once(path: Path) -> None:
    whole = random_states(5)
    file = StateFile(path, 5, WIDTH, torch.bfloat16)
    file.write(0, whole)
    assert torch.equal(file.read([(0, 5)]), whole.to(torch.bfloat16))


def test_states_with_a_graph_are_written_without_it(path: Path) -> None:
    file = StateFile(path, 2, WIDTH, torch.float32)
    with torch.no_grad():
        file.write(0, random_states(2).requires_grad_())
    assert not file.read([(0, 2)]).requires_grad


def test_what_was_read_is_a_copy(path: Path) -> None:
    whole = random_states(4)
    file = StateFile(path, 4, WIDTH, torch.float32)
    file.write(0, whole)
    for spans in ([(0, 4)], [(0, 2), (2, 2)]):
        file.read(spans).zero_()
    assert torch.equal(file.read([(0, 4)]), whole)
    kept = file.read([(0, 4)])
    file.write(0, torch.zeros(4, WIDTH))
    assert torch.equal(kept, whole)


def test_pages_that_are_given_back_lose_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []

    class Map(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            given_back.append(option)
            super().madvise(option)

    monkeypatch.setattr(mmap, "mmap", Map)
    tokens = 3 * mmap.PAGESIZE // (WIDTH * 4)
    # Two rows of ten tokens are below it, three are not.
    monkeypatch.setattr(states, "DROP_AFTER", 25 * WIDTH * 4)
    whole = random_states(tokens)
    file = StateFile(path, tokens, WIDTH, torch.float32)
    for start in range(0, tokens, 10):
        file.write(start, whole[start : start + 10])
    writes = len(given_back)
    assert writes == -(-tokens // 10) // 3
    for start in range(0, tokens - 10, 10):
        assert torch.equal(file.read([(start, 10)]), whole[start : start + 10])
    assert len(given_back) > writes
    assert set(given_back) == {mmap.MADV_DONTNEED}
    file.write(7, torch.zeros(2, WIDTH))
    file._map.madvise(mmap.MADV_DONTNEED)
    whole[7:9] = 0
    assert torch.equal(file.read([(0, tokens)]), whole)


def test_a_file_is_opened_again_with_what_was_in_it(path: Path) -> None:
    whole = random_states(9)
    file = StateFile(path, 9, WIDTH, torch.float32)
    file.write(0, whole)
    file.flush()
    assert path.read_bytes() == whole.numpy().tobytes()
    again = StateFile(path, 9, WIDTH, torch.float32)
    assert torch.equal(again.read([(0, 9)]), whole)
    again.write(2, torch.ones(1, WIDTH))
    assert torch.equal(file.read([(2, 1)]), torch.ones(1, WIDTH))  # both are the same file


def test_only_the_owner_can_read_the_file(path: Path) -> None:
    """It holds what forget text does to a model."""
    StateFile(path, 1, WIDTH, torch.float32)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_are_no_special_case(path: Path, tokens: int) -> None:
    file = StateFile(path, tokens, WIDTH, torch.float32)
    file.write(0, random_states(tokens))
    assert file.read([(0, tokens)]).shape == (tokens, WIDTH)
    file.flush()
    assert StateFile(path, tokens, WIDTH, torch.float32).read([(0, tokens)]).shape[0] == tokens


def test_a_full_disk_shows_when_the_file_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[tuple[int, int]] = []

    def full(_descriptor: int, start: int, size: int) -> None:
        reserved.append((start, size))
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir())) if opened.exists() else 0
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        StateFile(path, 10, WIDTH, torch.float32)
    assert caught.value.errno == errno.ENOSPC
    assert reserved == [(0, 10 * WIDTH * 4)]
    if before:
        assert len(list(opened.iterdir())) == before  # nothing is left open


def test_blocks_are_reserved_where_the_system_can(path: Path) -> None:
    tokens = 2**20 // (WIDTH * 4)
    StateFile(path, tokens, WIDTH, torch.float32)
    assert path.stat().st_blocks * 512 >= tokens * WIDTH * 4


def test_without_a_way_to_reserve_blocks_the_file_is_made_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    file = StateFile(path, 3, WIDTH, torch.float32)
    file.write(0, random_states(3))
    assert torch.equal(file.read([(0, 3)]), random_states(3))
