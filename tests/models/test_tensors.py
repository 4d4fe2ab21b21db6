"""Single tensors of a safetensors file, against the library that defines the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import refusal
from expunge.errors import RunError
from expunge.models.tensors import (
    metadata_of,
    overwrite_tensor,
    read_tensor,
    stored_tensors,
    write_tensors,
)

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def of_every_kind() -> dict[str, torch.Tensor]:
    """Every dtype in several shapes: none, scalars, a row, three dimensions."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{dtype}.{shape}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for dtype in DTYPES
        for shape in ((), (1,), (5,), (3, 7), (2, 3, 4), (0,), (3, 0))
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return of_every_kind()


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_what_is_found_and_read_is_what_the_library_reads(
    path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    stored = stored_tensors(path)
    content = path.read_bytes()
    with safe_open(path, framework="pt") as opened:
        assert set(stored) == set(opened.keys()) == set(tensors)  # and no __metadata__
        for name, entry in stored.items():
            expected = opened.get_tensor(name)
            assert (entry.dtype, entry.shape) == (expected.dtype, tuple(expected.shape))
            assert entry.bytes == expected.numel() * expected.element_size()
            raw = content[entry.start : entry.start + entry.bytes]
            assert raw == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
            found = read_tensor(entry)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    assert max(entry.start + entry.bytes for entry in stored.values()) == len(content)


def test_values_survive_to_the_bit(tmp_path: Path) -> None:
    """NaN payloads, infinities, negative zero and subnormal numbers."""
    bits = torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800000, -0x80000000, 1], dtype=torch.int32)
    save_file({"odd": bits.view(torch.float32)}, tmp_path / "odd.safetensors")
    found = read_tensor(stored_tensors(tmp_path / "odd.safetensors")["odd"])
    assert torch.equal(found.view(torch.int32), bits)


def test_a_tensor_that_was_read_does_not_depend_on_the_file(path: Path) -> None:
    name = f"{torch.float32}.(3, 7)"
    stored = stored_tensors(path)[name]
    found = read_tensor(stored)
    before = found.clone()
    overwrite_tensor(stored, torch.zeros(3, 7))
    assert torch.equal(found, before)
    found += 1
    assert not read_tensor(stored).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3, 7), (2, 3, 4), (3, 0)])
def test_overwriting_changes_the_tensors_bytes_and_no_others(
    path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    name = f"{dtype}.{shape}"
    stored = stored_tensors(path)[name]
    before = path.read_bytes()
    new = torch.randint(100, 127, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if dtype == torch.bool:
        new = ~tensors[name]
    overwrite_tensor(stored, new)
    after = path.read_bytes()
    assert after[: stored.start] == before[: stored.start]
    assert after[stored.start + stored.bytes :] == before[stored.start + stored.bytes :]
    loaded = load_file(path)
    assert torch.equal(loaded[name], new)
    assert (after != before) == bool(stored.bytes)


def test_a_tensor_in_another_order_of_memory_is_written_in_the_files(path: Path) -> None:
    name = f"{torch.float32}.(3, 7)"
    turned = torch.arange(21.0).view(7, 3).t().requires_grad_()
    overwrite_tensor(stored_tensors(path)[name], turned)
    assert torch.equal(load_file(path)[name], turned.detach())


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 7, dtype=torch.float64), torch.zeros(7, 3), torch.zeros(21), torch.zeros(())],
)
def test_another_dtype_or_shape_is_refused_and_nothing_written(path: Path, wrong: torch.Tensor) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"for StoredTensor\("):
        overwrite_tensor(stored_tensors(path)[f"{torch.float32}.(3, 7)"], wrong)
    assert path.read_bytes() == before


@pytest.mark.parametrize("lost", [1, 40])
def test_a_file_that_lost_its_end_after_it_was_opened_is_told(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "short.safetensors"
    save_file({"first": torch.ones(4), "last": torch.ones(10)}, path)
    stored = stored_tensors(path)
    path.write_bytes(path.read_bytes()[:-lost])
    assert torch.equal(read_tensor(stored["first"]), torch.ones(4))
    with pytest.raises(RunError) as caught:
        read_tensor(stored["last"])
    assert str(caught.value) == f"{path}: ends before its tensors do; fetch it again"


def reheaded(whole: bytes, old: bytes, new: bytes) -> bytes:
    """The file with something in its header exchanged."""
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length]
    assert old in header
    header = header.replace(old, new)
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut in its length": lambda whole: whole[:5],
    "cut in its header": lambda whole: whole[:30],
    "cut in its tensors": lambda whole: whole[:-1],
    "longer than its tensors": lambda whole: whole + b"\0",
    "no JSON": lambda whole: reheaded(whole, b"{", b"x"),
    "no object": lambda _: (2).to_bytes(8, "little") + b"[]",
    "no offsets": lambda whole: reheaded(whole, b"data_offsets", b"data_places"),
    "no shape": lambda whole: reheaded(whole, b"shape", b"forms"),
    "a smaller shape": lambda whole: reheaded(whole, b"[2,2]", b"[2,1]"),
    "a larger shape": lambda whole: reheaded(whole, b"[2,2]", b"[2,9]"),
    "tensors that overlap": lambda whole: reheaded(
        whole[:-12], b'"shape":[3],"data_offsets":[16,28]', b'"shape":[3],"data_offsets":[4,16]'
    ),
    "a negative shape": lambda whole: reheaded(whole, b"[2,2]", b"[-2,-2]"),
    "a fraction in a shape": lambda whole: reheaded(whole, b"[2,2]", b"[2.0,2]"),
    "a boolean in a shape": lambda whole: reheaded(whole, b"[2,2]", b"[4,true]"),
    "deep nesting": lambda _: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a gap": lambda whole: reheaded(whole + b"\0\0\0\0", b"[16,28]", b"[20,32]"),
    "offsets before the start": lambda whole: reheaded(whole, b"[0,16]", b"[-8,8]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    save_file({"a": torch.ones(2, 2), "b": torch.ones(3)}, path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    message = refusal(lambda: stored_tensors(path))
    assert message.startswith(f"{path}: is not a whole safetensors file (")


def test_what_is_written_is_what_the_library_reads(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "written.safetensors"
    # The library wants every tensor at a multiple of its own size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    ordered["turned"] = torch.arange(6, dtype=torch.uint8).view(2, 3).t()
    write_tensors(path, ordered, {"facts": '{"a": "é"}', "format": "pt"})
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"facts": '{"a": "é"}', "format": "pt"}
        assert set(opened.keys()) == set(ordered)
        for name, tensor in ordered.items():
            assert opened.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(opened.get_tensor(name), tensor)
    assert metadata_of(path) == {"facts": '{"a": "é"}', "format": "pt"}
    # The format's writers begin the tensors at a multiple of eight.
    assert min(entry.start for entry in stored_tensors(path).values()) % 8 == 0


def test_what_is_written_is_read_back_whatever_the_order(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "written.safetensors"
    for names in (sorted(tensors), sorted(tensors)[::-1], []):
        write_tensors(path, {name: tensors[name] for name in names}, {})
        stored = stored_tensors(path)
        assert list(stored) == names
        for name in names:
            assert torch.equal(read_tensor(stored[name]), tensors[name])


def test_a_file_without_metadata_has_none(tmp_path: Path) -> None:
    save_file({"row": torch.ones(3)}, tmp_path / "plain.safetensors")
    assert metadata_of(tmp_path / "plain.safetensors") == {}


def test_a_dtype_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    header = json.dumps({"packed": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "eight.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    message = refusal(lambda: stored_tensors(path))
    told = "give a checkpoint in float32, bfloat16 or float16"
    assert message == f"{path}: tensor packed has the dtype F8_E4M3; {told}"
