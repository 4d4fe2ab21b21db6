"""Times the evaluation of a model's rows against the published protocol, one row at a time.

    python benchmarks/evaluation.py --model DIRECTORY [--rows N] [--rounds 3] [--output table.md]

The other side is the protocol of SemEval-2025 Task 4 as it is published: for each row one call of
`generate`, greedy, with KV cache, at most 256 new tokens; for each document one forward pass; no
padding. Both sides run in turn in this process on the same rows with the same weights, dtype and
threads, and score with the same functions. Every row must get the same score on both, or the
benchmark fails.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import GenerationConfig

from expunge.data.rows import Row, RowSet, as_rows, documents, read_rows
from expunge.data.tokenization import TextPolicy, encode_rows, prompt_ids
from expunge.evaluation.generation import MAX_NEW_TOKENS
from expunge.evaluation.passes import Passes
from expunge.evaluation.scorecard import Material, evaluate_model
from expunge.evaluation.scores import knowledge, regurgitation
from expunge.maths.membership import membership_auc
from expunge.maths.numerics import token_log_probs
from expunge.models.loading import check_model, load_model
from expunge.models.text_forms import text_policy
from expunge.processes import OneProcess
from expunge.reporting.tables import markdown

Scores = dict[str, float]
HEADER = ("part", "rows", "one at a time, s", "expunge, s", "ratio (median)", "ratios", "results")
LOSS_TOLERANCE = 1e-4
"""Relative: float32 sums in another order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--forget", type=Path, help="default: forget.jsonl of the model")
    parser.add_argument("--retain", type=Path, help="default: retain.jsonl of the model")
    parser.add_argument("--nonmembers", type=Path, help="default: nonmembers.jsonl, if it is there")
    parser.add_argument("--rows", type=int, help="rows a set, evenly spaced; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", action="store_true", help="compare batch sizes 1 and 64, time none")
    parser.add_argument("--output", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    checked = check_model(str(arguments.model))
    policy = text_policy(checked, chat_template=False, long_rows="refuse")
    model = load_model(checked, arguments.dtype, "cpu")
    sets = {
        name: _rows(getattr(arguments, name) or arguments.model / f"{name}.jsonl", arguments.rows)
        for name in ("forget", "retain")
    }
    never_seen = arguments.nonmembers or arguments.model / "nonmembers.jsonl"
    if never_seen.is_file():
        sets["nonmembers"] = _rows(never_seen, arguments.rows)
    if arguments.batches:
        _compare_batch_sizes(model, checked.tokenizer, sets, policy)
        return

    asked = [*sets["forget"], *sets["retain"]]
    sides: dict[str, tuple[int, Side, Side, Check]] = {
        "regurgitation and knowledge": (
            len(asked),
            lambda: _generated_alone(model, checked.tokenizer, asked, policy),
            lambda: _generated(model, checked.tokenizer, sets, policy, arguments.batch_size),
            _same_scores,
        )
    }
    if "nonmembers" in sets:
        groups = {name: documents(sets[name]) for name in ("forget", "nonmembers")}
        sides["membership inference"] = (
            sum(map(len, groups.values())),
            lambda: _losses_alone(model, checked.tokenizer, groups, policy),
            lambda: _losses(model, checked.tokenizer, groups, policy, arguments.batch_size),
            _same_losses,
        )
    lines = [_measured(name, *side, arguments.rounds) for name, side in sides.items()]
    text = markdown(HEADER, lines) + f"\n{arguments.model.name}, {arguments.dtype}, {_machine()}.\n"
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    print(text)


Side = Callable[[], Scores]
Check = Callable[[Scores, Scores], str]


def _measured(name: str, rows: int, alone: Side, batched: Side, check: Check, rounds: int) -> list[str]:
    """A table line; the order of the sides alternates, as the machine may change its pace."""
    times: dict[Side, list[float]] = {alone: [], batched: []}
    said = ""
    for number in range(rounds):
        results: dict[Side, Scores] = {}
        for side in (alone, batched) if number % 2 == 0 else (batched, alone):
            start = time.perf_counter()
            results[side] = side()
            times[side].append(time.perf_counter() - start)
        said = check(results[alone], results[batched])
        ratio = times[alone][-1] / times[batched][-1]
        print(f"{name}, round {number + 1}: {ratio:.1f}, {said}", file=sys.stderr, flush=True)
    ratios = [slow / fast for slow, fast in zip(times[alone], times[batched], strict=True)]
    return [
        name,
        str(rows),
        f"{statistics.median(times[alone]):.1f}",
        f"{statistics.median(times[batched]):.1f}",
        f"{statistics.median(ratios):.1f}",
        ", ".join(f"{ratio:.1f}" for ratio in ratios),
        said,
    ]


def _generated_alone(model: Any, tokenizer: Any, rows: Sequence[Row], policy: TextPolicy) -> Scores:
    scores = {}
    for row in rows:
        ids = torch.tensor([prompt_ids(row, tokenizer, policy)])
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(MAX_NEW_TOKENS, policy.context - ids.shape[1]),
            use_cache=True,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.no_grad():
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        scores[row.id] = (regurgitation if row.kind == "sc" else knowledge)(row.output, text)
    return scores


def _generated(
    model: Any, tokenizer: Any, sets: Mapping[str, RowSet], policy: TextPolicy, batch_size: int
) -> Scores:
    card = evaluate_model(
        model,
        tokenizer,
        Material(sets["forget"], sets["retain"]),
        policy=policy,
        batch_size=batch_size,
    )
    return {record["id"]: record["score"] for record in card.records}


def _losses_alone(
    model: Any, tokenizer: Any, groups: Mapping[str, Sequence[Row]], policy: TextPolicy
) -> Scores:
    losses = {}
    for name, rows in groups.items():
        for example in encode_rows(rows, tokenizer, policy, eos=False):
            ids = torch.tensor([example.input_ids])
            with torch.no_grad():
                log_probs = token_log_probs(model(input_ids=ids).logits, ids)[0]
            counted = torch.tensor(example.token_mask[1:])
            losses[f"{name} {example.row_id}"] = -float(log_probs[counted].mean())
    return losses


def _losses(
    model: Any,
    tokenizer: Any,
    groups: Mapping[str, Sequence[Row]],
    policy: TextPolicy,
    batch_size: int,
) -> Scores:
    losses: Scores = {}
    for name, rows in groups.items():
        examples = encode_rows(rows, tokenizer, policy, eos=False)
        found = Passes(model, tokenizer, policy, batch_size, lambda *_: None, OneProcess()).losses(
            examples, name
        )
        losses |= {f"{name} {row}": loss for row, loss in found.items()}
    return losses


def _same_scores(alone: Scores, batched: Scores) -> str:
    other = sorted(row for row in alone if alone[row] != batched[row])
    if other or alone.keys() != batched.keys():
        raise SystemExit(f"{len(other)} of {len(alone)} rows differ, first {other[:1]}")
    return f"{len(alone)} of {len(alone)} rows equal"


def _same_losses(alone: Scores, batched: Scores) -> str:
    worst = max(abs(alone[row] - batched[row]) / abs(alone[row]) for row in alone)
    aucs = {_auc(losses) for losses in (alone, batched)}
    if worst > LOSS_TOLERANCE or len(aucs) > 1:
        raise SystemExit(f"losses differ by {worst:.1e} of their value, AUCs are {aucs}")
    return f"same AUC, losses within {worst:.0e}"


def _auc(losses: Scores) -> float:
    sides: dict[str, list[float]] = {"forget": [], "nonmembers": []}
    for name, loss in losses.items():
        sides[name.split(" ", 1)[0]].append(loss)
    return membership_auc(sides["forget"], sides["nonmembers"])


def _compare_batch_sizes(
    model: Any, tokenizer: Any, sets: Mapping[str, RowSet], policy: TextPolicy
) -> None:
    """Prints whether scorecards of batch size 1 and 64 are the same, row by row."""
    one, many = (
        evaluate_model(
            model,
            tokenizer,
            Material(sets["forget"], sets["retain"], sets.get("nonmembers")),
            policy=policy,
            batch_size=size,
        )
        for size in (1, 64)
    )
    pairs = list(zip(one.records, many.records, strict=True))
    texts = sum(a["generated"] == b["generated"] for a, b in pairs)
    scores = sum(a["score"] == b["score"] for a, b in pairs)
    print(f"{texts} of {len(pairs)} texts and {scores} of {len(pairs)} scores equal")
    same = one.to_json() == many.to_json()
    print(f"scorecards {'equal' if same else 'DIFFER'}: {many.to_json()}")


def _rows(path: Path, count: int | None) -> RowSet:
    rows = read_rows(str(path), "nonmembers" if "nonmembers" in path.name else "forget")
    if count is None or count >= len(rows):
        return rows
    every = list(rows)
    return as_rows([every[i * len(every) // count] for i in range(count)], "forget")


def _machine() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{names[0] if names else platform.machine()}, {psutil.cpu_count(logical=False)} cores,"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
