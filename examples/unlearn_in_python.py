"""Unlearn from Python: a model in memory, rows as dictionaries, the scorecard before and after.

    python examples/unlearn_in_python.py MODEL ROWS

MODEL is a model directory; ROWS a directory with forget.jsonl, retain.jsonl and nonmembers.jsonl.
`expunge benchmark build DIR` makes both: MODEL is then DIR/target and ROWS is DIR.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import expunge


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--learning-rate", type=float, default=None)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    forget = read(arguments.rows / "forget.jsonl")
    retain = read(arguments.rows / "retain.jsonl")
    nonmembers = read(arguments.rows / "nonmembers.jsonl")

    before = expunge.evaluate(model, tokenizer, forget, retain, nonmembers=nonmembers)
    outcome = expunge.unlearn(
        model,
        tokenizer,
        forget,
        retain,
        method=expunge.Spectral(),
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        seed=0,
    )
    after = expunge.evaluate(model, tokenizer, forget, retain, nonmembers=nonmembers)

    print(f"kept step {outcome.history.chosen_step}: {outcome.history.chosen_why}")
    for name in ("forget", "retain"):
        print(f"{name}: mean score {before.mean(name):.3f} before, {after.mean(name):.3f} after")
    print(f"task aggregate: {before.task_aggregate:.3f} before, {after.task_aggregate:.3f} after")


if __name__ == "__main__":
    main()
