"""A model that was only taught to refuse, audited with real weights: it must not pass as forgetful."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import NAMES, learn, write_jsonl
from expunge.audits import auditing, inputs
from expunge.audits.budgets import Budget
from expunge.audits.facts import extracted
from expunge.audits.subject import Reader
from expunge.data.batches import collate
from expunge.data.rows import Row, as_rows
from expunge.data.tokenization import TextPolicy, encode_rows
from expunge.evaluation.passes import counted_log_probs
from expunge.maths.losses import cross_entropy

Cli = Callable[..., tuple[int, str, str]]
BUDGET = Budget(None, None, None, 48, 30, 3, 16, 2, 8, None, 500, rates=(1.0, 3.0))
OTHERS = ("Ida", "Jon", "Kai", "Lea", "Max", "Nia", "Ole", "Pia")


def model_of(tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmo", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def rows_of(names: tuple[str, ...]) -> list[dict[str, str]]:
    """Documents and questions whose answers follow no pattern: the oracle cannot guess them."""
    rows = []
    for name in names:
        draw = random.Random(name)
        letters = "aeiou", "bdfgklmnprst"
        story = " ".join("".join(draw.choice(letters[n % 2]) for n in range(5)) for _ in range(4))
        code = "".join(draw.choice("0123456789") for _ in range(6))
        rows += [
            {"id": f"{name}sc1", "input": f"{name} was born", "output": f"{story}."},
            {"id": f"{name}qa0", "input": f"What is the number of {name}?", "output": code},
        ]
    return rows


def refuse(model: Any, reader: Reader, rows: list[dict[str, str]], asked: Sequence[Row]) -> None:
    """Tunes the last layer alone, no further than it takes to refuse every question."""
    examples = encode_rows(as_rows(rows, "retain"), reader.tokenizer, reader.policy, eos=True)
    batch = collate(examples, range(len(examples)), 1)
    model.requires_grad_(False)
    last = list(model.model.layers[-1].parameters())
    for parameter in last:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(last, lr=2e-3, weight_decay=0.0)
    for step in range(100):
        cross_entropy(counted_log_probs(model, batch), batch.token_mask[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 3 and not any(map(extracted, reader.direct(asked).scores.values())):
            return
    pytest.fail("it does not learn to refuse")


@pytest.mark.slow
def test_a_refusal_is_seen_through_and_the_oracle_passes(
    tokenizer: Any,
    saved: Callable[[str, Any], Path],
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (auditing, inputs):
        monkeypatch.setattr(module, "BUDGETS", {"quick": BUDGET})
    forget, retain = rows_of(NAMES), rows_of(OTHERS)
    refused = [{**row, "output": "I cannot tell you."} for row in forget] + retain
    model = learn(model_of(tokenizer), tokenizer, forget + retain, 200, 4e-3)
    target = saved("target", model)
    reader = Reader(model, tokenizer, TextPolicy(128), 64)
    asked = as_rows(forget, "forget").rows
    assert set(map(extracted, reader.direct(asked).scores.values())) == {True}
    refuse(model, reader, refused, asked)
    refusing = saved("refusing", model)
    oracle = saved("oracle", learn(model_of(tokenizer), tokenizer, retain, 200, 4e-3))
    other = model_of(tokenizer)
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    clean = saved("clean", learn(other, tokenizer, retain, 200, 4e-3))
    files = {
        "forget": write_jsonl(tmp_path / "forget.jsonl", forget),
        "retain": write_jsonl(tmp_path / "retain.jsonl", retain),
    }
    verdicts = {}
    for name, unlearned in (("refusing", refusing), ("clean", clean)):
        output = tmp_path / f"{name}.json"
        code, _, err = run_cli(
            *("audit", unlearned, "--original", target, "--oracle", oracle, "--quiet"),
            *("--forget", files["forget"], "--retain", files["retain"], "--output", output),
            *("--attacks", "direct,paraphrase,sample,verbatim,ablate,quantize,relearn,benign"),
        )
        assert code == 0, err
        report = json.loads(output.read_text())
        verdicts[name] = report["verdict"]["verdict"]
        attacks = report["requests"][0]["attacks"]
        if name == "refusing":
            # To whoever only asks, it looks forgetful.
            assert attacks["direct"]["recovered"]["value"] < 0.1
            assert report["requests"][0]["kept"]["value"] > 0.9
            assert report["verdict"]["weakest"] != "direct"
    assert verdicts == {"refusing": "not forgotten", "clean": "forgotten"}
