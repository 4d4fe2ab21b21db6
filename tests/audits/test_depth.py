"""Unlearning depth: against plain hooks and one row at a time, at its limits, and end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, shaken, tiny_model
from expunge.audits import budgets
from expunge.audits.attacks.depth import _groups, answer_states, depth, lost
from expunge.audits.base import Case, Found, ModelName
from expunge.audits.budgets import Budget
from expunge.audits.catalog import ATTACKS
from expunge.audits.subject import Pair, Reader
from expunge.audits.summary import summarise
from expunge.data.rows import Row
from expunge.data.tokenization import TextPolicy
from expunge.models.decoder import DecoderLayout, find_layout

Cli = Callable[..., tuple[int, str, str]]
BUDGET = Budget(None, None, None, 9, 1, 1, 1, 1, 1, None, 50)


def reader_of(model: Any, tokenizer: Any, batch_size: int = 64) -> Reader:
    return Reader(model, tokenizer, TextPolicy(128), batch_size)


def drawn_pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    pairs: list[Pair] = []
    for start, count in ((5, 3), (1, 1), (12, 7), (4, 3)):
        ids = torch.randint(2, 300, (start + count,), generator=generator).tolist()
        pairs.append((ids[:start], ids[start:]))
    return pairs


def one_by_one(
    target: Any, source: Any, layout: DecoderLayout, pairs: Sequence[Pair]
) -> list[list[float]]:
    """What the formula says, with a hook a place and a pass a row; in float64."""
    found = []
    for prompt, answer in pairs:
        ids = torch.tensor([[*prompt, *answer]])
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)

        def score(ids: torch.Tensor = ids, places: range = places) -> float:
            told = target(input_ids=ids).logits[0].double().log_softmax(-1)
            return sum(float(told[place, ids[0, place + 1]]) for place in places) / len(places)

        with torch.no_grad():
            states = source(input_ids=ids, output_hidden_states=True).hidden_states
            plain, losses = score(), []
            for layer in range(layout.count):
                module = target.get_submodule(f"{layout.layers}.{layer}")
                caught: list[torch.Tensor] = []
                # hidden_states ends in what the final norm gives, so the layer itself is asked.
                keep = source.get_submodule(f"{layout.layers}.{layer}").register_forward_hook(
                    lambda _m, _i, out, caught=caught: caught.append(
                        out[0] if isinstance(out, tuple) else out
                    )
                )
                source(input_ids=ids)
                keep.remove()
                if layer + 1 < layout.count:
                    torch.testing.assert_close(caught[0], states[layer + 1])

                def exchange(
                    _m: Any, _i: Any, out: Any, given: Any = caught[0], places: range = places
                ) -> Any:
                    mine = (out[0] if isinstance(out, tuple) else out).clone()
                    for place in places:
                        mine[0, place] = given[0, place]
                    return (mine, *out[1:]) if isinstance(out, tuple) else mine

                handle = module.register_forward_hook(exchange)
                losses.append(plain - score())
                handle.remove()
        found.append(losses)
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_what_is_lost_is_that_of_plain_hooks_and_no_hook_stays(family: str, tokenizer: Any) -> None:
    target = shaken(tiny_model(family, len(tokenizer)))
    source = shaken(tiny_model(family, len(tokenizer)), seed=2)
    layout, pairs = find_layout(target), drawn_pairs()
    states = answer_states(reader_of(source, tokenizer), layout, pairs)
    assert [[tuple(s.shape) for s in each] for each in states] == [
        [(len(answer), layout.width)] * layout.count for _, answer in pairs
    ]
    reader = reader_of(target, tokenizer)
    before = reader.log_probs(pairs)
    found = lost(reader, layout, pairs, states)
    assert reader.log_probs(pairs) == before
    # float32 in padded batches against one row at a time.
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64),
        torch.tensor(one_by_one(target, source, layout, pairs), dtype=torch.float64),
        rtol=1e-4,
        atol=1e-4,
    )
    assert max(abs(value) for losses in found for value in losses) > 0.1


def test_the_targets_own_states_cost_nothing_and_the_order_of_rows_does_not_matter(
    tokenizer: Any,
) -> None:
    target, source = (shaken(tiny_model("olmo", len(tokenizer)), seed) for seed in (1, 2))
    layout, pairs = find_layout(target), drawn_pairs()
    reader = reader_of(target, tokenizer)
    own = lost(reader, layout, pairs, answer_states(reader, layout, pairs))
    assert own == [[0.0] * layout.count] * len(pairs)
    found = []
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        for batch_size in (64, 1):
            mine = [pairs[n] for n in order]
            states = answer_states(reader_of(source, tokenizer, batch_size), layout, mine)
            losses = lost(reader_of(target, tokenizer, batch_size), layout, mine, states)
            found.append([losses[order.index(n)] for n in range(len(pairs))])
    for other in found[1:]:
        # A padded batch sums in another order.
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), rtol=0, atol=1e-5)


def test_states_that_are_held_fit_where_keys_and_values_do(tokenizer: Any) -> None:
    reader = reader_of(shaken(tiny_model("olmo", len(tokenizer))), tokenizer, batch_size=1)
    pairs = drawn_pairs() * 20
    groups = _groups(reader, pairs)
    assert [n for group in groups for n in group] == list(range(len(pairs)))
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    sizes = [sum(len(pairs[n][1]) for n in group) for group in groups]
    assert max(sizes) <= 2 * longest
    assert len(groups) > 1
    assert _groups(reader_of(reader.model, tokenizer), drawn_pairs()) == [[0, 1, 2, 3]]


def test_the_formula() -> None:
    def written(oracle: Sequence[float], unlearned: Sequence[float]) -> float:
        pairs = [(a, b) for a, b in zip(oracle, unlearned, strict=True) if a > 0.05]
        above = sum(a * min(max(b / a, 0.0), 1.0) for a, b in pairs)
        return above / sum(a for a, _ in pairs)

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        oracle, unlearned = torch.randn(2, 6, generator=generator).tolist()
        oracle[0] = 1.0
        value = depth(oracle, unlearned)
        assert value == pytest.approx(written(oracle, unlearned), abs=1e-12)
        assert value is not None
        assert 0 <= value <= 1
    lacking = [0.04, 0.3, 2.0]
    assert depth(lacking, lacking) == 1.0
    assert depth(lacking, [9.0, 9.0, 9.0]) == 1.0
    assert depth(lacking, [9.0, 0.0, -3.0]) == 0.0
    assert depth(lacking, [0.0, 0.15, 1.0]) == pytest.approx(0.5)
    assert depth([0.05, -1.0], [1.0, 1.0]) is None
    assert depth([math.nan, 1.0], [1.0, 1.0]) is None
    assert depth([1.0], [math.inf]) is None


FACTS = [Row(f"f{n}qa0", f"forget {n}?", f"a{n}", kind="qa") for n in range(4)]


def losses(*values: float) -> dict[str, float]:
    return {row.id: value for row, value in zip(FACTS, values, strict=True)}


def entry_of(unlearned: Found, oracle: Found) -> dict[str, Any]:
    case = Case(FACTS, FACTS, FACTS, [], [], [], [], {}, BUDGET, 0, 1e-3)
    models: dict[ModelName, Found] = {
        "target": Found({}),
        "unlearned": unlearned,
        "oracle": oracle,
    }
    summary = summarise(ATTACKS["depth"], models, case)
    assert summary.evidence == []
    return summary.entry


def test_the_depth_is_the_mean_over_the_facts_that_the_oracle_lacks() -> None:
    oracle = Found({"layer 0": losses(0.0, 1.0, 1.0, 0.0), "layer 1": losses(2.0, 1.0, 3.0, 0.01)})
    mine = Found({"layer 0": losses(0.0, 0.5, 1.0, 2.0), "layer 1": losses(1.0, 0.0, 4.0, 2.0)})
    oracle = replace(oracle, control={"layer 0": {"r": 0.5, "q": 0.25}, "layer 1": {"r": 0.0}})
    entry = entry_of(mine, oracle)
    # 1 / 2, (0.5 + 0) / 2, (1 + 3) / 4; of the fourth the oracle lacks nothing.
    depths = [row["outcomes"]["unlearned"]["depth"] for row in entry["rows"]]
    assert depths == [0.5, 0.25, 1.0, None]
    assert entry["depth"]["value"] == pytest.approx(1.75 / 3, abs=1e-6)
    assert entry["depth"]["low"] <= entry["depth"]["value"] <= entry["depth"]["high"]
    assert entry["models"]["oracle"]["numbers"]["lost"] == {"layer 0": 0.5, "layer 1": 1.502}
    assert "over 3 of 4 facts" in entry["sentence"]
    assert entry["models"]["oracle"]["numbers"]["lost_on_retain"] == {
        "layer 0": 0.375,
        "layer 1": 0.0,
    }
    assert "cost 1.00 on forget rows and 0.19 on retain rows" in entry["sentence"]
    assert entry["recovered"] is None


def test_without_layers_that_hold_the_answers_nothing_is_claimed() -> None:
    little = Found({"layer 0": losses(1.0, 0.04, 0.0, -1.0)})
    entry = entry_of(little, little)
    assert entry["power"]["has_power"] is False
    assert "1 of 4 answers" in entry["sentence"]
    assert "depth" not in entry


@pytest.fixture
def audit(
    run_cli: Cli,
    memorised_dir: Path,
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    from expunge.audits import auditing, inputs

    small = replace(budgets.BUDGETS["quick"], facts=None, retain=8, resamples=50)
    for module in (auditing, inputs, budgets):
        monkeypatch.setattr(module, "BUDGETS", {"quick": small})

    def call(model: Path, *options: object) -> dict[str, Any]:
        output = tmp_path / "audit.json"
        code, out, err = run_cli(
            *("audit", model, "--original", memorised_dir, "--forget", row_files["forget"]),
            *("--retain", row_files["retain"], "--device", "cpu", "--output", output, *options),
        )
        assert code == 0, err
        (request,) = json.loads(output.read_text())["requests"]
        return {**request, "printed": out + err, "file": output.read_text()}

    return call


def test_the_target_is_0_and_the_oracle_is_1_end_to_end(
    audit: Callable[..., dict[str, Any]],
    nudged_dir: Path,
    forgetful_dir: Path,
    oracle_dir: Path,
    tmp_path: Path,
    forget_rows: list[dict[str, str]],
) -> None:
    cache = tmp_path / "cache"
    options = ("--attacks", "depth", "--oracle", oracle_dir, "--cache", cache)
    nudged, forgetful = (audit(model, *options) for model in (nudged_dir, forgetful_dir))
    # The target's states cost retain rows nothing either.
    kept = nudged["attacks"]["depth"]["models"]["unlearned"]["numbers"]["lost_on_retain"]
    assert max(map(abs, kept.values())) < 0.05
    # Both are their models but for one part in 10,000 of each weight.
    assert nudged["attacks"]["depth"]["depth"]["value"] < 0.02
    assert forgetful["attacks"]["depth"]["depth"]["value"] > 0.98
    for request in (nudged, forgetful):
        attack = request["attacks"]["depth"]
        assert attack["sentence"] in request["printed"]
        assert len(attack["rows"]) == len(forget_rows)
        nothing: dict[str, float] = {}
        assert attack["models"]["target"]["numbers"] == {
            "lost": nothing,
            "lost_on_retain": nothing,
        }
        for numbers in attack["models"]["oracle"]["numbers"].values():
            assert set(numbers) == {f"layer {n}" for n in range(4)}
        assert " on retain rows" in attack["sentence"]
        kept = "".join(path.read_text() for path in cache.iterdir())
        for row in forget_rows:
            assert row["output"] not in request["printed"] + request["file"] + kept
    # What is inside is information beside the verdict, which the words decide.
    assert forgetful["verdict"]["weakest"] == "direct"
    assert len(list(cache.glob("depth-oracle-*"))) == 1


def test_without_an_oracle_or_with_another_architecture_it_says_why(
    audit: Callable[..., dict[str, Any]],
    run_cli: Cli,
    nudged_dir: Path,
    memorised_dir: Path,
    row_files: dict[str, Path],
    tokenizer: Any,
    saved: Callable[[str, Any], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = audit(nudged_dir, "--attacks", "direct")
    assert "(--oracle)" in request["not_run"]["depth"]
    assert "depth: not run: " in request["printed"]
    other = saved("shallow", tiny_model("olmo", len(tokenizer), layers=2))
    from expunge.audits import subject

    monkeypatch.setattr(subject, "load_model", lambda *_: pytest.fail("a model was loaded"))
    code, out, err = run_cli(
        *("audit", nudged_dir, "--original", memorised_dir, "--forget", row_files["forget"]),
        *("--retain", row_files["retain"], "--attacks", "depth", "--oracle", other),
    )
    assert (code, out) == (2, "")
    assert "--attacks depth: the oracle has 2 olmo layers of width 16, the target 4 olmo" in err
    assert err.count("\n") == 1
