"""Adaptive RMU: the segment engine against a loop of the published kind, on the same rows.

The other side is written from the description of the public implementations: two whole models in
memory, batches padded to their longest row, every forward pass through all layers and the LM head,
three passes a step (forget, retain, retain in the frozen model). It is given what they lack for the
comparison's sake: the frozen model's norm per token, computed once, and a mask for padding, so that
both sides compute the same update; that the updates agree is checked.

Each side runs in a process of its own, in turn, on the same threads. A side's time starts when its
model files are there: for the engine it holds reading the layers, the check and the fill of the cache;
for the other side the loading of its two models is left out.

    python benchmarks/adaptive_rmu.py --rows-dir ../shared/lume --tokenizer ../shared/models/lume-mini
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALPHA, BETA, LEARNING_RATE = 30.0, 5.0, 1e-4


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.side:
        _side(arguments)
        return
    from machine import describe_machine

    lines = [
        f"Machine: {describe_machine(arguments.threads)}. OLMo architecture, {arguments.layers} layers,"
        f" width {arguments.width}, vocabulary {arguments.vocabulary}, {arguments.dtype};"
        f" {arguments.rows} LUME rows a side, batch {arguments.batch_size}; medians of"
        f" {arguments.rounds} rounds.",
        "",
        "| layer l | epochs | published loop, s | engine, s | of it fill, s | times faster |"
        " memory, published MiB | memory, engine MiB | share | updates differ by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        _make_model(arguments, Path(scratch) / "model")
        for layer in arguments.layer:
            rounds = [_round(arguments, layer, Path(scratch)) for _ in range(arguments.rounds)]
            for epochs in arguments.report_epochs:
                lines.append(_row(layer, epochs, arguments.epochs, rounds))
                sys.stdout.write(lines[-1] + "\n")
                sys.stdout.flush()
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")


def _row(layer: int, epochs: int, ran: int, rounds: list[dict[str, Any]]) -> str:
    """One line; a number of epochs that was not run is computed from the epochs that were."""

    def total(side: dict[str, Any]) -> float:
        if epochs == ran:
            return float(side["total"])
        return float(side["setup"] + epochs * statistics.median(side["epochs"]))

    published = [total(r["published"]) for r in rounds]
    engine = [total(r["engine"]) for r in rounds]
    ratio = statistics.median(p / e for p, e in zip(published, engine, strict=True))
    memory = [
        statistics.median(r[side]["peak"] for r in rounds) / 2**20 for side in ("published", "engine")
    ]
    share = statistics.median(r["engine"]["peak"] / r["published"]["peak"] for r in rounds)
    computed = "" if epochs == ran else " (computed)"
    return (
        f"| {layer} | {epochs}{computed} | {statistics.median(published):.0f} |"
        f" {statistics.median(engine):.1f} |"
        f" {statistics.median(r['engine']['setup'] for r in rounds):.1f} | {ratio:.1f} |"
        f" {memory[0]:.0f} | {memory[1]:.0f} | {share:.2f} |"
        f" {max(r['difference'] for r in rounds):.1e} |"
    )


def _round(arguments: argparse.Namespace, layer: int, scratch: Path) -> dict[str, Any]:
    """Both sides once, and by how much their updates differ."""
    import torch
    from safetensors.torch import load_file

    result: dict[str, Any] = {}
    for side in ("published", "engine"):
        command = [
            sys.executable, __file__, "--side", side, "--scratch", str(scratch),
            "--layer", str(layer),
            *(f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in _PASSED),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        result[side] = json.loads(done.stdout.splitlines()[-1])
    published = load_file(scratch / "published.safetensors")
    engine = load_file(scratch / "engine.safetensors")
    target = load_file(scratch / "model" / "model.safetensors")
    result["difference"] = max(
        float(
            torch.linalg.norm(engine[name] - published[name])
            / torch.linalg.norm(published[name] - target[name])
        )
        for name in published
    )
    return result


_PASSED = (
    "rows", "rows_dir", "tokenizer", "batch_size", "epochs", "dtype", "threads",
)  # fmt: skip


def _side(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run = {"published": _published, "engine": _engine}[arguments.side]
    figures, weights = run(arguments)
    from safetensors.torch import save_file

    figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save_file(weights, Path(arguments.scratch) / f"{arguments.side}.safetensors")
    sys.stdout.write(json.dumps(figures) + "\n")


def _prepared(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The run, ready to begin, and the model's checked files."""
    from transformers import AutoTokenizer

    from expunge.data.rows import read_rows
    from expunge.methods.adaptive_rmu import AdaptiveRMU
    from expunge.models.loading import check_model
    from expunge.training.options import TrainingOptions
    from expunge.training.preparation import prepare

    checked = check_model(str(Path(arguments.scratch) / "model"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    sets: list[Any] = []
    for side in ("forget", "retain"):
        rows = list(read_rows(arguments.rows_dir, side))
        sets.append([rows[i * len(rows) // arguments.rows] for i in range(arguments.rows)])
    prepared = prepare(
        # What the published loop does, and nothing of what was added to it.
        AdaptiveRMU(
            layer=arguments.layer[0],
            alpha=ALPHA,
            beta=BETA,
            directions="shared",
            draws=1,
            forget_tokens="all",
            row_balance=0.0,
            random_rows=0,
            optimizer="adamw",
            calibration_gain=0.0,
        ),
        TrainingOptions(
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            select="last",
            validation_fraction=0,
            chat_template="off",
        ),
        checked.config,
        checked.layout,
        tokenizer,
        sets[0],
        sets[1],
        None,
    )
    return prepared, checked


def _engine(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    from expunge.models.parts import StreamedModel
    from expunge.training.progress import Silent
    from expunge.training.unlearning import Place, open_engine, unlearn_prepared

    prepared, checked = _prepared(arguments)
    steps: list[float] = []
    started = time.monotonic()
    parts = StreamedModel(checked, getattr(torch, arguments.dtype), "cpu")
    engine = open_engine(prepared, checked.layout, parts)
    outcome = unlearn_prepared(
        prepared,
        checked.layout,
        parts,
        engine,
        None,
        Place(started),
        Silent(),
        lambda entry: steps.append(time.monotonic()),
    )
    total = time.monotonic() - started
    setup = outcome.seconds["prepare"] + outcome.seconds["start"]
    per_epoch = prepared.used.steps_per_epoch
    ends = [started + setup, *steps[per_epoch - 1 :: per_epoch]]
    figures = {
        "total": total,
        "setup": setup,
        "epochs": [after - before for before, after in itertools.pairwise(ends)],
    }
    return figures, dict(outcome.finished.weights)


def _published(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    from expunge.data.batches import collate
    from expunge.data.sampling import EpochBatches
    from expunge.methods.adaptive_rmu import AdaptiveRMU
    from expunge.methods.base import Context

    prepared, checked = _prepared(arguments)
    dtype = getattr(torch, arguments.dtype)
    layer = arguments.layer[0]
    updated, frozen = (
        AutoModelForCausalLM.from_pretrained(checked.files.directory, dtype=dtype).eval()
        for _ in range(2)
    )
    updated.requires_grad_(False)
    frozen.requires_grad_(False)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (layer - 2, layer - 1, layer)]
    trained = {name: updated.get_parameter(name) for name in names}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(trained.values()), lr=LEARNING_RATE, weight_decay=0.0)
    context = Context(
        model=updated, layout=checked.layout, forget=prepared.forget, retain=prepared.retain,
        pad_id=prepared.pad_id, batch_size=arguments.batch_size, seed=0,
        device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False),
        progress=lambda *_: None,
    )  # fmt: skip
    method = prepared.method
    assert isinstance(method, AdaptiveRMU)
    direction = next(iter(method.draw_directions(context).vectors.values()))

    def state(model: Any, batch: Any) -> Any:
        outputs = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
        return outputs.hidden_states[layer + 1]

    def distance(states: Any, target: Any, mask: Any) -> Any:
        return (states - target).square().mean(-1)[mask].mean()

    def order_of(side: str, rows: Any) -> EpochBatches:
        return EpochBatches(
            rows,
            arguments.batch_size,
            prepared.pad_id,
            lambda epoch: context.generator(f"{side} order of epoch {epoch}"),
            by_length=False,
        )

    batches = order_of("forget", prepared.forget), order_of("retain", prepared.retain)
    started = time.monotonic()
    norms = {}
    with torch.no_grad():
        for begin in range(0, len(prepared.forget), arguments.batch_size):
            chosen = range(begin, min(begin + arguments.batch_size, len(prepared.forget)))
            batch = collate(prepared.forget, chosen, prepared.pad_id)
            found = state(frozen, batch).norm(dim=-1)
            for row, index in enumerate(chosen):
                norms[index] = found[row, : batch.lengths[row]]
    setup = time.monotonic() - started
    ends = [time.monotonic()]
    per_epoch = prepared.used.steps_per_epoch
    for step in range(1, prepared.used.steps + 1):
        forget, retain = (side.at(step) for side in batches)
        target = torch.zeros(*forget.input_ids.shape, checked.config.hidden_size)
        for row, index in enumerate(forget.indices):
            target[row, : len(norms[index])] = BETA * norms[index][:, None] * direction
        loss = distance(state(updated, forget), target, forget.token_mask)
        with torch.no_grad():
            before = state(frozen, retain)
        loss = loss + ALPHA * distance(state(updated, retain), before, retain.token_mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % per_epoch == 0:
            ends.append(time.monotonic())
    total = time.monotonic() - started
    figures = {
        "total": total,
        "setup": setup,
        "epochs": [after - before for before, after in itertools.pairwise(ends)],
    }
    return figures, {name: p.detach().float().clone() for name, p in trained.items()}


def _make_model(arguments: argparse.Namespace, directory: Path) -> None:
    """A model of the asked geometry with random weights, large enough for layers to matter."""
    import torch
    from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.width // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    OlmoForCausalLM(config).to(getattr(torch, arguments.dtype)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(directory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows-dir", required=True, help="a directory with forget.* and retain.*")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=192, help="rows a side")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10, help="epochs that are run")
    parser.add_argument("--report-epochs", type=int, nargs="+", default=[3, 10, 30])
    parser.add_argument("--layer", type=int, nargs="+", default=[14])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="directory for the models and results")
    parser.add_argument("--output", help="write the table here")
    parser.add_argument("--side", choices=("published", "engine"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
