"""States that one run hands to the next: the bytes of a run from the embeddings; moved, not copied."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, random_examples, shaken, tiny_model
from expunge.data.tokenization import Example
from expunge.models.decoder import find_layout
from expunge.models.parts import WholeModel
from expunge.segments.cache_layout import CacheLayout, lay_out
from expunge.segments.engine import SegmentEngine
from expunge.segments.prefix import Prefix

VOCABULARY = 300


def silent(_name: str, _done: int, _total: int) -> None:
    pass


def filled(
    family: str,
    first: int,
    cache: CacheLayout,
    directory: Path,
    prefix: Prefix | None,
    ran: list[int] | None = None,
) -> tuple[bytes, bytes]:
    """What a fill for layers `first` to `first` + 2 of 6 writes; `ran` hears which layers were run."""
    model = shaken(tiny_model(family, VOCABULARY, layers=6))
    layout = find_layout(model)
    engine = SegmentEngine(WholeModel(model), layout, first, first + 2, nullcontext, measures=False)
    if ran is not None:
        for index in range(layout.count):
            layout.layer(model, index).register_forward_hook(
                lambda _m, _i, _o, index=index: ran.append(index)
            )
    directory.mkdir(exist_ok=True)
    engine.fill(cache, directory, silent, prefix=prefix)
    return (directory / "below").read_bytes(), (directory / "targets").read_bytes()


def layout_of(examples: list[Example], dtype: torch.dtype = torch.float32) -> CacheLayout:
    return lay_out(examples, [], 16, dtype, None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "prefix").mkdir()
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fill_that_goes_on_gives_the_bytes_of_one_from_the_embeddings(
    family: str, place: Path
) -> None:
    cache = layout_of(random_examples((9, 12, 7), VOCABULARY))
    prefix = Prefix(place / "prefix")
    filled(family, 1, cache, place / "one", prefix)
    ran: list[int] = []
    gone_on = filled(family, 3, cache, place / "three", prefix, ran)
    assert gone_on == filled(family, 3, cache, place / "alone", None)
    # Layers 1 and 2 once for the states below, then the segment for the targets; never layer 0.
    assert sorted(set(ran)) == [1, 2, 3, 4, 5]


def test_the_states_change_hands_and_are_on_the_disk_once(place: Path) -> None:
    cache = layout_of(random_examples((9, 12), VOCABULARY))
    prefix = Prefix(place / "prefix")
    filled("olmo", 1, cache, place / "one", prefix)
    kept = place / "prefix" / "states"
    assert kept.stat().st_ino == (place / "one" / "below").stat().st_ino
    inode = kept.stat().st_ino
    (place / "one" / "below").unlink()  # the first run ends
    assert prefix.take(cache, 2, place / "moved") == 1
    assert (place / "moved").stat().st_ino == inode
    assert not kept.exists()
    assert prefix.take(cache, 2, place / "moved again") == 0


def test_the_same_layer_again_runs_nothing_below(place: Path) -> None:
    cache = layout_of(random_examples((9, 12), VOCABULARY))
    prefix = Prefix(place / "prefix")
    first = filled("llama", 2, cache, place / "one", prefix)
    ran: list[int] = []
    assert filled("llama", 2, cache, place / "two", prefix, ran) == first
    assert sorted(set(ran)) == [2, 3, 4]


@pytest.mark.parametrize("other", ["rows", "dtype", "lower layer"])
def test_states_that_do_not_serve_are_left_alone(other: str, place: Path) -> None:
    examples = random_examples((9, 12), VOCABULARY)
    prefix = Prefix(place / "prefix")
    filled("olmo", 2, layout_of(examples), place / "one", prefix)
    rows = examples[::-1] if other == "rows" else examples
    dtype = torch.bfloat16 if other == "dtype" else torch.float32
    first = 1 if other == "lower layer" else 3
    assert prefix.take(layout_of(rows, dtype), first, place / "taken") == 0
    assert not (place / "taken").exists()
    assert prefix.take(layout_of(examples), 3, place / "taken") == 2


def test_nothing_is_shared_where_the_cache_is_narrower_than_the_model(place: Path) -> None:
    cache = layout_of(random_examples((9, 12), VOCABULARY), torch.bfloat16)
    prefix = Prefix(place / "prefix")
    filled("olmo", 1, cache, place / "one", prefix)
    assert list((place / "prefix").iterdir()) == []
    shared = filled("olmo", 3, cache, place / "three", prefix)
    assert shared == filled("olmo", 3, cache, place / "alone", None)


def test_a_fill_that_was_cut_off_begins_at_the_embeddings(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = layout_of(random_examples((9, 12), VOCABULARY))
    prefix = Prefix(place / "prefix")
    filled("olmo", 1, cache, place / "one", prefix)
    with monkeypatch.context() as patch:
        patch.setattr(SegmentEngine, "_fill_targets", lambda *_: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):  # noqa: PT011
            filled("olmo", 3, cache, place / "three", prefix)
    ran: list[int] = []
    again = filled("olmo", 3, cache, place / "three", prefix, ran)
    assert 0 in ran
    assert again == filled("olmo", 3, cache, place / "alone", None)
