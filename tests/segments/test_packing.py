"""Packed rows: what each row would give alone, in every family, with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from conftest import FAMILIES, shaken, tiny_model
from expunge.segments import packing
from expunge.segments.packing import NotASegment, packed, positions_of

LENGTHS = (9, 1, 4, 13)
WINDOW = 5
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "olmo3": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
FEWER_KV_HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "gemma": {"head_dim": 8},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
KINDS = {
    **{f"{family} with a window": (family, extra) for family, extra in SLIDING.items()},
    **{f"{family} with shared keys": (family, extra) for family, extra in FEWER_KV_HEADS.items()},
}
WAYS = pytest.mark.parametrize("way", ["_row_by_row", "_padded"])


def model_of(family: str, **extra: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SIZES | extra)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(AutoModelForCausalLM.from_config(config).eval())


def rows_of(lengths: Sequence[int] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, 64, (length,), generator=generator) for length in lengths]


def apart(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    """Each row in a pass of its own, through the model's own attention: (tokens, vocabulary)."""
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def together(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    """All rows in one pass."""
    lengths = [len(row) for row in rows]
    with packed(model.config, lengths):
        outputs = model(
            input_ids=torch.cat(rows)[None],
            position_ids=positions_of(lengths, torch.device("cpu"))[None],
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool),
            use_cache=False,
        )
    return outputs.logits[0]


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Attention takes this way whatever the device; the list grows with each call."""
    calls: list[int] = []
    chosen = getattr(packing, way)

    def attend(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[3]))
        return chosen(*arguments)

    monkeypatch.setattr(packing, "_row_by_row", attend)
    return calls


def assert_rows_are_alone(model: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of every weight."""
    calls = use(way, monkeypatch)
    rows = rows_of()
    found, expected = together(model, rows), apart(model, rows)
    assert calls == [len(rows)] * model.config.num_hidden_layers
    # The same sums in another order, float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(7))
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), weights),
        torch.autograd.grad((expected * direction).sum(), weights),
        strict=True,
    ):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm().clamp(min=1e-3))


@WAYS
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_what_they_are_alone(
    family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_rows_are_alone(shaken(tiny_model(family, 64)), way, monkeypatch)


@WAYS
@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_shared_keys_are_the_models_own(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, extra = KINDS[kind]
    assert_rows_are_alone(model_of(family, **extra), way, monkeypatch)


@pytest.mark.parametrize("family", SLIDING)
def test_the_window_of_these_models_shows(family: str) -> None:
    """Else the test above would not notice a window that is left out."""
    narrow = model_of(family, **SLIDING[family])
    wide = model_of(family, **SLIDING[family] | {"sliding_window": 64})
    wide.load_state_dict(narrow.state_dict())
    rows = rows_of()
    with torch.no_grad():
        difference = (apart(narrow, rows) - apart(wide, rows)).abs().amax(-1)
    beyond = positions_of(LENGTHS, torch.device("cpu")) >= WINDOW
    assert difference[beyond].min() > 1e-2
    assert difference[~beyond].max() < 1e-4


def test_rows_side_by_side_without_packing_are_not_what_they_are_alone() -> None:
    """What packing is for; a model whose attention mixed rows would be noticed."""
    model = model_of("llama")
    rows = rows_of()
    with torch.no_grad():
        mixed = model(input_ids=torch.cat(rows)[None], use_cache=False).logits[0]
        assert (mixed - apart(model, rows))[LENGTHS[0] :].abs().amax(-1).min() > 1e-2


@WAYS
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_attention_against_its_definition(
    scaling: float | None, window: int | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax over the keys of the same row that are not ahead, and fewer than `window` behind."""
    use(way, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    lengths, heads, groups, width = (5, 1, 7), 6, 2, 4
    tokens = sum(lengths)
    query = torch.randn(1, heads, tokens, width, generator=generator)
    key, value = (torch.randn(1, heads // groups, tokens, width, generator=generator) for _ in range(2))
    row_of = [row for row, length in enumerate(lengths) for _ in range(length)]
    expected = torch.zeros(1, tokens, heads, width, dtype=torch.float64)
    for head in range(heads):
        for i in range(tokens):
            seen = [
                j for j in range(i + 1) if row_of[j] == row_of[i] and (window is None or i - j < window)
            ]
            q = query[0, head, i].double()
            k, v = (x[0, head // groups, seen].double() for x in (key, value))
            scores = (k @ q) * (1 / math.sqrt(width) if scaling is None else scaling)
            expected[0, i, head] = scores.softmax(0) @ v
    token = packing._lengths.set(lengths)
    try:
        found, weights = packing._packed_attention(
            torch.nn.Identity(), query, key, value, None, scaling=scaling, sliding_window=window
        )
    finally:
        packing._lengths.reset(token)
    assert weights is None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_positions_start_anew_with_every_row() -> None:
    found = positions_of([3, 1, 2], torch.device("cpu"))
    assert found.tolist() == [0, 1, 2, 0, 0, 1]


def test_the_models_own_attention_is_put_back_even_after_an_error() -> None:
    model = model_of("llama")
    assert model.config._attn_implementation == "sdpa"

    def fail() -> None:
        with packed(model.config, [2]):
            assert model.config._attn_implementation != "sdpa"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(LookupError):
        packing._lengths.get()
    rows = rows_of()
    with torch.no_grad():
        before = apart(model, rows)
        together(model, rows)
        assert torch.equal(apart(model, rows), before)


def test_packing_inside_packing_comes_back_to_the_outer_rows() -> None:
    model = model_of("llama")
    rows = rows_of()
    with torch.no_grad():
        alone = together(model, rows)
        with packed(model.config, LENGTHS):
            together(model, rows[:2])
            assert packing._lengths.get() == LENGTHS
        assert torch.equal(together(model, rows), alone)


def test_soft_capping_is_refused() -> None:
    model = model_of("gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW)
    with pytest.raises(NotASegment, match="soft capping"):
        together(model, rows_of())
    assert model.config._attn_implementation == "eager"
    uncapped = model_of(
        "gemma2",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=None,
    )
    with torch.no_grad():
        torch.testing.assert_close(
            together(uncapped, rows_of()), apart(uncapped, rows_of()), rtol=1e-4, atol=1e-4
        )


def test_dropout_in_attention_is_refused_while_it_acts() -> None:
    model = model_of("llama", attention_dropout=0.5)
    together(model, rows_of())
    with pytest.raises(NotASegment, match="dropout"):
        together(model.train(), rows_of())


def test_gradients_in_bfloat16_are_rounded_once() -> None:
    """As those of float32 are, also under autocast, which would compute them in bfloat16."""
    generator = torch.Generator().manual_seed(5)
    lengths = (9, 4)
    states = torch.randn(3, 1, 4, sum(lengths), 16, generator=generator).bfloat16()
    weights = torch.randn(1, 4, sum(lengths), 16, generator=generator)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        given = [part.to(dtype).requires_grad_(True) for part in states]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            query, key, value = given
            output = packing._row_by_row(query, key, value, lengths, None, max(lengths))
        assert output.dtype == dtype
        (output.float() * weights.bfloat16().float()).sum().backward()
        found = []
        for part in given:
            assert part.grad is not None
            found.append(part.grad.bfloat16())
        return found

    for rounded, whole in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert torch.equal(rounded, whole)
