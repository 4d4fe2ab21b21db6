"""Document losses against one row, one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from conftest import passes_of, random_examples, shaken, tiny_model
from expunge.data.rows import Row
from expunge.data.tokenization import Example, TextPolicy, encode_rows


def slow_losses(model: Any, examples: list[Example]) -> dict[str, float]:
    """Mean over a document's counted tokens, each predicted from the window before it."""
    losses: dict[str, list[float]] = {}
    for example in examples:
        for position in range(1, len(example)):
            if example.token_mask[position]:
                ids = torch.tensor([example.input_ids[:position]])
                with torch.no_grad():
                    weights = model(input_ids=ids).logits[0, -1].double().exp()
                share = float(weights[example.input_ids[position]] / weights.sum())
                losses.setdefault(example.row_id, []).append(-math.log(share))
    return {name: sum(values) / len(values) for name, values in losses.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("family", ["olmo", "gpt2"])
def test_losses_are_those_of_each_row_alone(family: str, batch_size: int) -> None:
    model = shaken(tiny_model(family, 300))
    examples = random_examples([7, 2, 12, 5], 300)
    told: list[tuple[str, int, int]] = []
    losses = passes_of(model, batch_size, lambda *said: told.append(said)).losses(examples, "rows")
    # float32 against double; a padded batch sums in another order.
    assert losses == pytest.approx(slow_losses(model, examples), rel=1e-4)
    assert told[-1] == ("loss of rows", len(examples), len(examples))


def test_a_windowed_row_is_one_document_whose_tokens_count_once(tokenizer: Any) -> None:
    model = shaken(tiny_model("llama", len(tokenizer)))
    rows = [Row("long", "Ada was born in Paris and " * 3, "lives there."), Row("short", "Ada", "x")]
    windows = encode_rows(rows, tokenizer, TextPolicy(16, long_rows="window"), eos=False)
    assert len(windows) > 3
    losses = passes_of(model, 2).losses(windows, "rows")
    assert losses == pytest.approx(slow_losses(model, windows), rel=1e-4)
    whole = encode_rows(rows, tokenizer, TextPolicy(1000), eos=False)
    tokens = {example.row_id: sum(example.token_mask[1:]) for example in whole}
    counts = dict.fromkeys(tokens, 0)
    for window in windows:
        counts[window.row_id] += sum(window.token_mask[1:])
    assert counts == tokens


def test_a_row_without_a_counted_token_has_no_loss() -> None:
    model = tiny_model("llama", 300)
    assert passes_of(model, 2).losses(random_examples([1, 3], 300), "rows")["row0"] == 0.0
