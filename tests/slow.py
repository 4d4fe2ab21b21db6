"""Slow readings of a model, one text and one token after another, for tests to compare with."""

from __future__ import annotations

from typing import Any

import torch


def greedy(model: Any, tokenizer: Any, prompt: str, most: int) -> str:
    """The likeliest tokens behind a prompt, as many as `most` and the context hold."""
    ids = list(tokenizer(prompt)["input_ids"])
    new: list[int] = []
    while len(new) < most and len(ids) + len(new) < model.config.max_position_embeddings:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(new, skip_special_tokens=True))


def log_probs(model: Any, tokenizer: Any, text: str) -> list[float]:
    """The log-probability of every token but the first, in nats."""
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(found[place - 1, ids[place]]) for place in range(1, len(ids))]
