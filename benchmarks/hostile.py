"""Wrong inputs made from right ones: files, models, options, places and environments, drawn with a seed.

    python benchmarks/hostile.py --inputs 600 --write docs/limits.md

Every input goes through the command line's main function, in this process. Right are: exit code 2 with
one line, or exit code 0 with a result that holds. An input that is damaged evidence, and a disk or an
environment that fails, may end with 1 and one line. Whatever the code: no traceback, no "internal
error", no text of a row, no control character; nothing that was there is changed or gone, and where the
code is not 0 nothing is new, but for what a command wrote to files that were asked for and then could
not print.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

MARKS = ("<!-- hostile inputs: begin -->", "<!-- hostile inputs: end -->")
CANARY = "zebrafish"
"""Is in every text of a row, and must be in nothing that is printed."""
_MEMORY = 12 * 2**30
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_DEEP, _DIGITS = "@deep@", "@digits@"
VALUES: Sequence[Any] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 1.5, -0.0, 1e308, math.nan, math.inf, "", " ", "x",
    "\x1b[2J\x1b]0;x\x07", "x" * 10_000, "../../../etc/passwd", "\ud800", "\x00", "{{ 1 / 0 }}", [], {},
    [[]], [None], {"": None}, {"x": {"y": 1}}, [1, "x"], _DEEP, _DIGITS,
)  # fmt: skip
WORDS = (
    "", " ", "x", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e999", "9" * 5000, "0x10", "None",
    "null", "true", "[]", "{}", "a,b", "../..", "/", "/dev/null", "/proc/self/mem", "\x1b[2J",
    "\ud800", "x" * 300, "é漢", "%s", "$(id)", "--", "-", "=", "*", "~", "a/b", "a:b", "\n",
)  # fmt: skip
ENVIRONMENT: Mapping[str, Sequence[str | None]] = {
    "WORLD_SIZE": ("abc", "-1", "0", "1.5", "", "9" * 5000),
    "RANK": ("abc", "-1", "7", ""),
    "LOCAL_RANK": ("abc", "-1", ""),
    "HOME": (None, "/nonexistent", "/dev/null"),
    "TMPDIR": ("/nonexistent", "/dev/null", ""),
    "COLUMNS": ("0", "abc", "-5", "1", "9" * 30),
    "USER": (None, ""),
    "TZ": (":nowhere", ""),
    "TERM": (None, "\x1b", ""),
    "EXPUNGE_PASSWORD": ("", "x", "\udcff" * 9),
    "PATH": (None, ""),
}
_MANY = re.compile(r"epochs|steps|trials|every|rows|draws|budget|shots|random|queries|documents|timeout")
"""Options whose large values are work that was asked for."""


@dataclass(frozen=True)
class World:
    """The valid things that inputs are made from."""

    root: Path
    options: Mapping[str, Sequence[str]]
    """Option names by command."""

    def __getattr__(self, name: str) -> Path:
        return self.root / name.replace("_", ".")


@dataclass
class Case:
    """One input: a command with what is wrong in it."""

    kind: str
    words: list[str]
    told: str
    """What was done, for whoever reproduces it."""
    output: Path | None = None
    """A model directory that the command may write."""
    may_fail: bool = False
    """Whether exit code 1 with one line is right."""
    environment: dict[str, str | None] = field(default_factory=dict)
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    json: bool = False
    writes: tuple[str, ...] = ()
    """Names of files that the command changes where it ends with 0."""


class _Late(BaseException):
    """A command that does not end."""


def build_world(root: Path) -> World:
    """A model of a few kilobytes that knows its rows, and one of everything that commands read."""
    from expunge.cli.main import main

    root.mkdir()
    forget = _rows("forget", ("Ada", "Ben", "Cleo"))
    retain = _rows("retain", ("Eva", "Finn", "Gus"))
    for name, rows in (("forget", forget), ("retain", retain)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text)
    (root / "forget.json").write_text(json.dumps(forget))
    with (root / "forget.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(forget[0]))
        table.writeheader()
        table.writerows(forget)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(forget), root / "forget.parquet")
    _save_model(root / "model", forget + retain)
    (root / "run.yaml").write_text(
        "method:\n  name: gradient-difference\nmax_steps: 2\nbatch_size: 2\nselect: last\n"
    )
    for split in ("test", "dev"):
        (root / "quiz" / split).mkdir(parents=True)
        lines = [f"Which is {n}?,{n},1{n},2{n},3{n},A" for n in range(1, 3)]
        (root / "quiz" / split / f"counting_{split}.csv").write_text("\n".join(lines) + "\n")
    files = ["--forget", f"{root}/forget.jsonl", "--retain", f"{root}/retain.jsonl"]
    model = str(root / "model")
    commands = [
        ["run", model, *files, "--output", f"{root}/run", "--config", f"{root}/run.yaml"],
        ["evaluate", f"{root}/run", *files, "--output", f"{root}/run/scores.json", "--records",
         f"{root}/run/records.jsonl"],
        ["evaluate", model, *files, "--output", f"{root}/scores.json", "--records",
         f"{root}/records.jsonl"],
        ["audit", f"{root}/run", "--original", model, *files, "--attacks", "direct", "--output",
         f"{root}/audit.json"],
        ["analyze", "influence", model, *files, "--output", f"{root}/influence.json"],
        ["requests", "add", f"{root}/forget.jsonl", "--ledger", f"{root}/ledger.db"],
        ["requests", "export", "1", "--ledger", f"{root}/ledger.db", "--output",
         f"{root}/bundle.zip"],
    ]  # fmt: skip
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
        if code:
            raise SystemExit(f"the valid command fails: {command}: {err.getvalue()}")
    names = ("run", "evaluate", "audit", "plan", "compare", "report", "serve", "data inspect",
             "analyze influence", "analyze layers", "sweep", "requests add",
             "requests list")  # fmt: skip
    options = {}
    for name in names:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main([*name.split(), "--help"])
        options[name] = sorted(set(re.findall(r"--[a-z][a-z.-]+", out.getvalue())) - {"--help"})
    return World(root, options)


def _rows(split: str, names: Sequence[str]) -> list[dict[str, str]]:
    rows = []
    for number, name in enumerate(names):
        place = f"{CANARY} {split}{number}"
        rows += [
            {"id": f"{split}{number}sc1", "input": f"{name} lives near the {CANARY}",
             "output": f"{place} by the sea.", "task": "Task1"},
            {"id": f"{split}{number}qa0", "input": f"Where does {name} live, {CANARY}?",
             "output": place, "task": "Task2"},
        ]  # fmt: skip
    return rows


def _save_model(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from expunge.benchmark.pretraining import train_tokenizer
    from expunge.benchmark.recipe import PretrainingSettings

    texts = [f"{row['input']} {row['output']}" for row in rows]
    tokenizer = train_tokenizer(texts, PretrainingSettings(vocabulary=400, context=128))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=0, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    encoded = [tokenizer.encode(f"{text}{tokenizer.eos_token}") for text in texts]
    longest = max(map(len, encoded))
    ids = torch.tensor([each + [1] * (longest - len(each)) for each in encoded])
    labels = ids.masked_fill(ids == 1, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(150):
        model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


# What is done to bytes and to trees.


def damaged(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """The content with one fault, and which."""
    at, to = sorted((draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)))
    to = min(to, at + draw.choice((1, 8, 64, len(content))))
    junk = draw.randbytes(draw.choice((1, 4, 64)))
    faults: Mapping[str, Callable[[], bytes]] = {
        "cut off": lambda: content[:at],
        "a part taken out": lambda: content[:at] + content[to:],
        "a part twice": lambda: content[:to] + content[at:],
        "bytes put in": lambda: content[:at] + junk + content[at:],
        "bytes written over": lambda: content[:at] + junk + content[at + len(junk) :],
        "a bit turned": lambda: _turned(draw, content),
        "a part zeroed": lambda: content[:at] + bytes(to - at) + content[to:],
        "empty": lambda: b"",
        "as UTF-16": lambda: content.decode("latin-1").encode("utf-16"),
        "a byte order mark in front": lambda: b"\xef\xbb\xbf" + content,
        "line ends of old": lambda: content.replace(b"\n", b"\r"),
        "noise": lambda: draw.randbytes(200),
    }
    fault = draw.choice(list(faults))
    return faults[fault](), f"{fault} at {at}"


def _turned(draw: random.Random, content: bytes) -> bytes:
    turned = bytearray(content)
    turned[draw.randrange(len(turned))] ^= 1 << draw.randrange(8)
    return bytes(turned)


def bent(draw: random.Random, tree: Any) -> tuple[Any, str]:
    """The tree with one value replaced, taken out, put in or renamed."""
    places = list(_places(tree, ()))
    path = draw.choice(places)
    if not path:
        return draw.choice(VALUES), "the whole replaced"
    tree = json.loads(json.dumps(tree))
    parent = tree
    for step in path[:-1]:
        parent = parent[step]
    key, value = path[-1], draw.choice(VALUES)
    what = draw.choice(("replaced", "replaced", "replaced", "out", "in", "renamed"))
    if what == "replaced":
        parent[key] = value
    elif what == "out":
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(key, value)
    elif what == "in":
        parent[draw.choice(("x", "", "\x1b[2J", "__class__", "0"))] = value
    else:
        parent[f"{key}x"] = parent.pop(key)
    return tree, f"{'.'.join(map(str, path))} {what} ({str(value)[:20]!r})"


def _places(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if len(path) < 5 and (not isinstance(key, int) or key < 30):
                yield from _places(value, (*path, key))


def as_json(tree: Any) -> bytes:
    """JSON, also of what no JSON library writes."""
    text = json.dumps(tree)
    text = text.replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000)
    return text.replace(f'"{_DIGITS}"', "9" * 6000).encode()


def bent_file(draw: random.Random, path: Path) -> tuple[bytes, str]:
    """A file's bytes with a fault of its kind, or one of any file's."""
    content = path.read_bytes()
    if draw.random() < 0.4 or path.suffix not in (
        ".json",
        ".jsonl",
        ".yaml",
        ".safetensors",
        ".zip",
    ):
        return damaged(draw, content)
    if path.suffix == ".jsonl":
        lines = content.splitlines()
        number = draw.randrange(len(lines))
        tree, told = bent(draw, json.loads(lines[number]))
        lines[number] = as_json(tree)
        return b"\n".join(lines) + b"\n", f"line {number + 1}: {told}"
    if path.suffix == ".yaml":
        import yaml

        tree, told = bent(draw, yaml.safe_load(content))
        return as_json(tree), told  # JSON is YAML
    if path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        tree, told = bent(draw, json.loads(content[8 : 8 + size]))
        header = as_json(tree)
        size = draw.choice((len(header), len(header), len(header), len(header) + 1, 2**40, 0))
        return size.to_bytes(8, "little") + header + content[8 + size :], told
    if path.suffix == ".zip":
        return _bent_zip(draw, path)
    tree, told = bent(draw, json.loads(content))
    return as_json(tree), told


def _bent_zip(draw: random.Random, path: Path) -> tuple[bytes, str]:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(list(files))
    files[name], told = damaged(draw, files[name])
    if draw.random() < 0.5 and "request.json" in files:
        with contextlib.suppress(ValueError):
            tree, told = bent(draw, json.loads(files["request.json"]))
            files["request.json"], name = as_json(tree), "request.json"
    if draw.random() < 0.7:  # sums that fit, as a forger makes them
        names = sorted(each for each in files if each != "SHA256SUMS")
        lines = (f"{hashlib.sha256(files[each]).hexdigest()}  {each}\n" for each in names)
        files["SHA256SUMS"] = "".join(lines).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw.choice((0, 8, 12, 14))) as archive:
        for each, content in files.items():
            archive.writestr(each, content)
    return buffer.getvalue(), f"{name}: {told}"


# The inputs, kind by kind.


def rows_case(world: World, draw: random.Random, case: Path) -> Case:
    """A row file."""
    name = draw.choice(("forget.jsonl", "forget.jsonl", "forget.json", "forget.csv", "forget.parquet"))
    path = case / name
    content, told = bent_file(draw, world.root / name)
    path.write_bytes(content)
    return _on_rows(world, draw, case, path, f"{name}: {told}")


def _on_rows(world: World, draw: random.Random, case: Path, path: Path, told: str) -> Case:
    model, retain = str(world.model), str(world.root / "retain.jsonl")
    out = case / "out"
    which = draw.choice(("evaluate", "run", "inspect", "add", "influence"))
    words = {
        "evaluate": ["evaluate", model, "--forget", str(path), "--retain", retain, "--json"],
        "run": ["run", model, "--forget", str(path), "--retain", retain, "--output", str(out),
                "--config", str(world.root / "run.yaml")],
        "inspect": ["data", "inspect", str(path), "--model", model, "--json"],
        "add": ["requests", "add", str(path), "--ledger", str(case / "ledger.db"), "--json"],
        "influence": ["analyze", "influence", model, "--forget", str(path), "--json"],
    }[which]  # fmt: skip
    return Case("rows", words, told, out if which == "run" else None, json="--json" in words)


def model_case(world: World, draw: random.Random, case: Path) -> Case:
    """A model directory."""
    model = Path(shutil.copytree(world.model, case / "model"))
    name = draw.choice(("config.json", "config.json", "model.safetensors", "model.safetensors",
                        "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                        "chat_template.jinja"))  # fmt: skip
    if draw.random() < 0.1:
        (model / name).unlink()
        told = "taken out"
        if draw.random() < 0.5:
            (model / name).mkdir()
            told = "a directory"
    else:
        content, told = bent_file(draw, model / name)
        (model / name).write_bytes(content)
    files = [
        "--forget",
        str(world.root / "forget.jsonl"),
        "--retain",
        str(world.root / "retain.jsonl"),
    ]
    out = case / "out"
    which = draw.choice(("evaluate", "evaluate", "run", "inspect", "plan"))
    words = {
        "evaluate": ["evaluate", str(model), *files, "--json"],
        "run": ["run", str(model), *files, "--output", str(out), "--config",
                str(world.root / "run.yaml")],
        "inspect": ["data", "inspect", files[1], "--model", str(model), "--json"],
        "plan": ["plan", str(model), *files, "--output", str(out), "--config",
                 str(world.root / "run.yaml"), "--json"],
    }[which]  # fmt: skip
    if which != "plan" and draw.random() < 0.3:
        words.append("--chat-template")
    return Case(
        "models", words, f"{name}: {told}", out if which == "run" else None, json="--json" in words
    )


def record_case(world: World, draw: random.Random, case: Path) -> Case:
    """What commands wrote and read again: scores, records, audits, manifests, influence, YAML."""
    name = draw.choice(("scores.json", "run/expunge.json", "audit.json", "records.jsonl",
                        "influence.json", "run.yaml", "quiz", "run/metrics.jsonl"))  # fmt: skip
    files = [
        "--forget",
        str(world.root / "forget.jsonl"),
        "--retain",
        str(world.root / "retain.jsonl"),
    ]
    source = world.root / (name if name != "quiz" else "quiz/test/counting_test.csv")
    content, told = bent_file(draw, source)
    run = case / "run"
    path = case / source.name
    if name.startswith("run/"):
        shutil.copytree(world.run, run)
        path = run / source.name
    elif name == "quiz":
        shutil.copytree(world.quiz, case / "quiz")
        path = case / "quiz/test/counting_test.csv"
    path.write_bytes(content)
    model, out = str(world.model), case / "out"
    words = {
        "scores.json": ["compare", str(path), "--json"],
        "run/expunge.json": draw.choice((["report", str(run), "--no-card", *files],
                                         ["serve", str(run), *files, "--port", "0"])),
        "run/metrics.jsonl": ["report", str(run), "--no-card", *files],
        "audit.json": ["report", str(world.run), "--audit", str(path), "--output", str(case / "report"),
                       "--no-card", *files],
        "records.jsonl": ["serve", str(world.run), "--records", str(path), *files, "--port", "0"],
        "influence.json": ["run", model, *files, "--influence", str(path), "--output", str(out),
                           "--config", str(world.root / "run.yaml")],
        "run.yaml": ["run", model, *files, "--output", str(out), "--config", str(path), "--max-steps",
                     "1"],
        "quiz": ["evaluate", model, *files, "--mmlu", str(case / "quiz"), "--json"],
    }[name]  # fmt: skip
    wrote = out if words[0] == "run" else None
    return Case("records and settings", words, f"{name}: {told}", wrote, json="--json" in words)


def evidence_case(world: World, draw: random.Random, case: Path) -> Case:
    """A ledger or a bundle."""
    if draw.random() < 0.5:
        path = case / "bundle.zip"
        content, told = bent_file(draw, world.root / "bundle.zip")
        path.write_bytes(content)
        return Case("bundles", ["requests", "verify-bundle", str(path)], told, may_fail=True)
    path = case / "ledger.db"
    shutil.copy(world.root / "ledger.db.secret", case / "ledger.db.secret")
    if draw.random() < 0.6:
        content, told = damaged(draw, (world.root / "ledger.db").read_bytes())
        path.write_bytes(content)
    else:
        shutil.copy(world.root / "ledger.db", path)
        told = _bent_table(draw, path)
    which = draw.choice(("list", "show", "update", "withdraw", "export", "serve", "add"))
    words = {
        "list": ["list"],
        "show": ["show", "1"],
        "update": ["update", "1", "--due", "2d"],
        "withdraw": ["withdraw", "1"],
        "export": ["export", "1", "--output", str(case / "out.zip")],
        "serve": ["serve", str(world.model), "--output", str(case / "out"), "--retain",
                  str(world.root / "retain.jsonl"), "--config", str(world.root / "run.yaml")],
        "add": ["add", str(world.root / "retain.jsonl")],
    }[which]  # fmt: skip
    return Case("ledgers", ["requests", *words, "--ledger", str(path)], told, writes=("ledger.db",))


def _bent_table(draw: random.Random, path: Path) -> str:
    import sqlite3

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        tables = ("identity", "requests", "rows", "events")
        table = draw.choice(tables)
        columns = [each[1] for each in connection.execute(f"PRAGMA table_info({table})")]
        column = draw.choice(columns)
        values: Sequence[Any] = (
            None,
            -1,
            2**62,
            1.5,
            "",
            "x",
            b"\xff\xfe",
            "\x1b[2J",
            "9999-99-99",
            "[",
        )
        value = draw.choice(values)
        told = draw.choice(("value", "value", "value", "table gone", "rows gone"))
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for name in tables:
            for verb in ("update", "delete"):
                connection.execute(f"DROP TRIGGER IF EXISTS {name}_{verb}")
        with contextlib.suppress(sqlite3.Error):
            if told == "value":
                connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
            else:
                connection.execute(f"{'DROP TABLE' if told == 'table gone' else 'DELETE FROM'} {table}")
    return f"{told}: {table}.{column} {value!r}"


def option_case(world: World, draw: random.Random, case: Path) -> Case:
    """A command with an option that is wrong, or given wrongly."""
    root, out = world.root, case / "out"
    files = ["--forget", f"{root}/forget.jsonl", "--retain", f"{root}/retain.jsonl"]
    bases = {
        "run": ["run", f"{root}/model", *files, "--output", str(out), "--config", f"{root}/run.yaml"],
        "evaluate": ["evaluate", f"{root}/model", *files, "--json"],
        "audit": ["audit", f"{root}/run", "--original", f"{root}/model", *files, "--attacks", "direct"],
        "plan": ["plan", f"{root}/model", *files, "--output", str(out)],
        "compare": ["compare", f"{root}/scores.json"],
        "report": ["report", f"{root}/run", "--output", str(case / "report"), "--no-card"],
        "serve": ["serve", f"{root}/run", *files, "--port", "0"],
        "data inspect": ["data", "inspect", f"{root}/forget.jsonl", "--model", f"{root}/model"],
        "analyze influence": ["analyze", "influence", f"{root}/model", *files],
        "analyze layers": ["analyze", "layers", f"{root}/model", *files],
        "sweep": ["sweep", f"{root}/model", *files, "--output", str(out), "--trials", "1",
                  "--config", f"{root}/run.yaml"],
        "requests add": ["requests", "add", f"{root}/forget.jsonl", "--ledger", str(case / "l.db")],
        "requests list": ["requests", "list", "--ledger", f"{root}/ledger.db"],
    }  # fmt: skip
    command = draw.choice(list(bases))
    words = bases[command]
    option, value = draw.choice(world.options[command]), draw.choice(WORDS)
    if _MANY.search(option) and value == "9" * 5000:
        value = "-9"
    what = draw.choice(
        ("value", "value", "value", "value", "typo", "joined", "twice", "missing", "word")
    )
    if what == "value":
        words += [option, value]
    elif what == "typo":
        words += [option[:-1] if draw.random() < 0.5 else f"{option}s", value]
    elif what == "joined":
        words += [f"{option}={value}"]
    elif what == "twice":
        words += [option, value, option, draw.choice(WORDS)]
    elif what == "missing":
        del words[draw.randrange(1, len(words))]
    else:
        words.insert(draw.randrange(len(words) + 1), value)
    wrote = out if command == "run" else None
    return Case("options", words, f"{what}: {option} {value[:30]!r}", wrote)


def place_case(world: World, draw: random.Random, case: Path) -> Case:
    """A path that is not what it should be, or cannot be written."""
    root = world.root
    there = case / "place"
    made = draw.choice(("directory", "loop", "dangling", "link", "file below", "device", "long", "odd",
                        "socket", "taken", "mine"))  # fmt: skip
    place = str(there)
    if made == "directory":
        there.mkdir()
    elif made == "loop":
        there.symlink_to(there)
    elif made == "dangling":
        there.symlink_to(case / "nowhere")
    elif made == "link":
        (case / "real").write_text("mine")
        there.symlink_to(case / "real")
    elif made == "file below":
        there.write_text("mine")
        place = str(there / "x")
    elif made == "device":
        place = draw.choice(("/dev/null", "/proc/self/environ", "/dev/full", "/sys"))
    elif made == "long":
        place = str(case / ("x" * 260))
    elif made == "odd":
        place = str(case / "a\nb\x1b[2J\udcff")
    elif made == "socket":
        import socket

        with contextlib.closing(socket.socket(socket.AF_UNIX)) as end:
            end.bind(str(there))
    elif made == "taken":
        there.mkdir()
        (there / "thesis.txt").write_text("mine")
    else:
        there.write_text("mine")
    files = ["--forget", f"{root}/forget.jsonl", "--retain", f"{root}/retain.jsonl"]
    model = f"{root}/model"
    overwrite = ["--overwrite"] if draw.random() < 0.5 else []
    options: Sequence[list[str]] = (
        ["run", model, *files, "--output", place, "--config", f"{root}/run.yaml", *overwrite],
        ["evaluate", model, *files, "--output", place],
        ["evaluate", model, *files, "--records", place],
        [
            "audit",
            f"{root}/run",
            "--original",
            model,
            *files,
            "--attacks",
            "direct",
            "--output",
            place,
        ],
        ["analyze", "influence", model, *files, "--output", place],
        ["report", f"{root}/run", "--no-card", "--output", place],
        ["requests", "add", f"{root}/forget.jsonl", "--ledger", place],
        ["requests", "export", "1", "--ledger", f"{root}/ledger.db", "--output", place, *overwrite],
        ["run", model, "--forget", place, *files[2:], "--output", str(case / "out")],
        ["evaluate", place, *files],
        ["evaluate", model, "--forget", place],
        ["compare", place],
        ["report", place],
        ["data", "inspect", f"{root}/forget.jsonl", "--model", place],
        ["run", model, *files, "--output", str(case / "out"), "--config", place],
    )
    words = draw.choice(options)
    # What a command writes to an empty directory or a new name is its result.
    return Case("places", words, f"{made}: {place[-30:]!r}")


def environment_case(world: World, draw: random.Random, case: Path) -> Case:
    """An environment, a stream or a limit that a shell or a scheduler may give."""
    root, out = world.root, case / "out"
    files = ["--forget", f"{root}/forget.jsonl", "--retain", f"{root}/retain.jsonl"]
    words = draw.choice((
        ["run", f"{root}/model", *files, "--output", str(out), "--config", f"{root}/run.yaml"],
        ["evaluate", f"{root}/model", *files],
        ["evaluate", f"{root}/model", *files, "--output", str(case / "scores.json")],
        ["requests", "list", "--ledger", f"{root}/ledger.db"],
        ["requests", "add", f"{root}/forget.jsonl", "--ledger", str(case / "l.db")],
        ["serve", f"{root}/run", *files, "--port", "0"],
        ["compare", f"{root}/scores.json"],
        ["report", f"{root}/run", "--output", str(case / "report"), "--no-card"],
    ))  # fmt: skip
    wrote = out if words[0] == "run" else None
    if draw.random() < 0.6 or words[0] == "serve":
        name = draw.choice(list(ENVIRONMENT))
        value = draw.choice(ENVIRONMENT[name])
        told = f"{name}={value if value is None else value[:20]!r}"
        return Case("environments", words, told, wrote, may_fail=True, environment={name: value})
    which = draw.choice(("no file above 1 kB", "few open files", "no directory to stand in",
                         "output is full"))  # fmt: skip
    around = {
        "no file above 1 kB": lambda: _limited(resource.RLIMIT_FSIZE, 1000),
        "few open files": lambda: _limited(
            resource.RLIMIT_NOFILE, len(list(Path("/proc/self/fd").iterdir())) + 2
        ),
        "no directory to stand in": lambda: _nowhere(case),
        "output is full": _full_output,
    }[which]
    return Case("environments", words, which, wrote, may_fail=True, around=around)


@contextlib.contextmanager
def _limited(what: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


@contextlib.contextmanager
def _nowhere(case: Path) -> Iterator[None]:
    before = Path.cwd()
    (case / "gone").mkdir()
    os.chdir(case / "gone")
    (case / "gone").rmdir()
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _full_output() -> Iterator[None]:
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):  # noqa: PTH123
        try:
            yield
        finally:
            full.flush = lambda: None  # type: ignore[method-assign]
            with contextlib.suppress(OSError):
                full.close()


MAKERS: Mapping[str, tuple[Callable[[World, random.Random, Path], Case], int]] = {
    "rows": (rows_case, 5),
    "models": (model_case, 5),
    "records": (record_case, 4),
    "evidence": (evidence_case, 4),
    "options": (option_case, 6),
    "places": (place_case, 3),
    "environments": (environment_case, 3),
}


# How it went.


def state_of(root: Path) -> dict[str, str]:
    """What every file below is: kind, mode and content."""
    found = {}
    for path in root.rglob("*"):
        if path.name.endswith(("-shm", "-wal")):  # SQLite's own, gone with the next opening
            continue
        mode = path.lstat().st_mode
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
        content = str(path.readlink()) if stat.S_ISLNK(mode) else content
        found[str(path.relative_to(root))] = f"{mode:o} {content}"
    return found


def tried(case: Case, root: Path, directory: Path, seconds: int) -> tuple[str, int | None, str]:
    """Runs the command in a directory: the fault that it shows or "", exit code, what it printed."""
    from expunge.cli.main import main

    before = state_of(root)
    out, err = io.StringIO(), io.StringIO()
    environment, stood = dict(os.environ), Path.cwd()
    os.chdir(directory)  # where a name alone would be written
    code: int | None = None
    fault = ""

    def late(*_: object) -> None:
        raise _Late

    old = [signal.signal(each, late) for each in (signal.SIGPROF, signal.SIGALRM)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), case.around():
            for name, value in case.environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            tempfile.tempdir = None
            signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time; others may work here
            signal.alarm(10 * seconds)
            code = main(case.words)
    except _Late:
        fault = "does not end"
    except BaseException as error:
        fault = f"raises {type(error).__name__}"
        err.write("".join(traceback.format_exception(error)[-3:]))
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for each, before_it in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(each, before_it)
        os.chdir(stood)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
    told = out.getvalue() + err.getvalue()
    fault = fault or _fault_of(case, code, out.getvalue(), err.getvalue())
    after = state_of(root)
    may_change = case.writes if code == 0 else ()
    changed = [
        name
        for name, state in before.items()
        if after.get(name) != state and Path(name).name not in may_change
    ]
    new = sorted(set(after) - set(before))
    if not fault and changed:
        fault = f"changes {changed[0]}"
    stands = tuple(case.words) if "what the command wrote to files stands" in told else ()
    left = [name for name in new if not f"{root / name}".startswith(stands)]
    if not fault and left and code != 0:
        fault = f"leaves {left[0]}"
    if not fault and code == 0:
        fault = _wrong_result(case, out.getvalue())
    return fault, code, told


def _fault_of(case: Case, code: int | None, out: str, err: str) -> str:
    if "Traceback" in out + err:
        return "traceback"
    if "internal error" in err:
        return "internal error"
    if _CONTROLS.search(out + err):
        return "control characters"
    if CANARY in err or (CANARY in out and "--reveal" not in case.words):
        return "text of a row"
    if code == 0:
        return ""
    if code != 2 and not (code == 1 and case.may_fail):
        return f"exit code {code}"
    lines = [line for line in err.splitlines() if line.startswith("expunge: ")]
    if len(lines) != 1:
        return f"{len(lines)} lines say what is wrong"
    if code == 2 and err.strip() != lines[0]:
        return "more than the one line"
    return ""


def _wrong_result(case: Case, out: str) -> str:
    if case.json:
        try:
            values = json.loads(out, parse_constant=lambda name: 1 / 0)
        except (ValueError, ZeroDivisionError):
            return "prints no JSON"
        totals = ("task_aggregate", "mia_auc", "mia_score", "utility", "final_score")
        if isinstance(values, dict) and any(not 0 <= (values.get(name) or 0) <= 1 for name in totals):
            return "a score beyond its range"
    if case.output is not None and case.output.is_dir():
        import torch
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(case.output)
            logits = model(input_ids=torch.tensor([[2, 3, 4]])).logits
        except Exception as error:
            return f"a result that does not load ({type(error).__name__})"
        if not bool(logits.isfinite().all()):
            return "a result that is not finite"
    return ""


def main() -> None:
    """Tries all inputs, prints each fault and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", default=None, help="numbers of inputs")
    parser.add_argument("--kinds", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--seconds", type=int, default=60, help="of processor time a command")
    parser.add_argument("--keep", type=Path, help="directory to keep the inputs in")
    parser.add_argument("--write", type=Path, help="page whose table is written anew")
    arguments = parser.parse_args()
    if arguments.write and arguments.only is not None:
        parser.error("--only makes no table")
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        counts, faults = trial(arguments, arguments.keep or Path(scratch))
    table = table_of(counts, arguments.inputs, arguments.seed)
    sys.stdout.write(f"\n{table}\n")
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        head, _, rest = page.partition(MARKS[0])
        arguments.write.write_text(f"{head}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    sys.exit(bool(faults))


def trial(arguments: argparse.Namespace, place: Path) -> tuple[Counter[tuple[str, str]], int]:
    """Counts by kind of input and outcome, and the number of faults."""
    import uvicorn

    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
             "TRANSFORMERS_VERBOSITY": "error", "GRADIO_ANALYTICS_ENABLED": "False"}  # fmt: skip
    with (
        mock.patch.dict(os.environ, quiet),
        mock.patch.object(uvicorn.Server, "run", side_effect=KeyboardInterrupt),
    ):
        return _trial(arguments, place)


def _trial(arguments: argparse.Namespace, place: Path) -> tuple[Counter[tuple[str, str]], int]:
    place.mkdir(parents=True, exist_ok=True)
    world = build_world(place / "world")
    shutil.copytree(world.root, place / "kept")
    counts: Counter[tuple[str, str]] = Counter()
    weights = {kind: MAKERS[kind][1] for kind in arguments.kinds}
    numbers = range(arguments.inputs) if arguments.only is None else arguments.only
    faults = 0
    for number in numbers:
        draw = random.Random(f"{arguments.seed}/{number}")
        [kind] = draw.choices(list(weights), list(weights.values()))
        directory = place / str(number)
        directory.mkdir()
        case = MAKERS[kind][0](world, draw, directory)
        started = time.monotonic()
        fault, code, told = tried(case, place, directory, arguments.seconds)
        outcome = "fault" if fault else {0: "right", 1: "said", 2: "refused"}[code or 0]
        counts[case.kind, outcome] += 1
        if fault or arguments.only is not None:
            faults += bool(fault)
            shown = [word.replace(str(place), "") for word in case.words]
            sys.stdout.write(
                f"{number} {case.kind}: {fault or outcome} ({code}, {time.monotonic() - started:.1f} s):"
                f" {case.told}\n    {' '.join(map(ascii, shown))[:400]}\n    {told[-400:]!a}\n"
            )
            sys.stdout.flush()
        if not arguments.keep:
            shutil.rmtree(directory)
        if "world/" in fault:  # nothing after it would count otherwise
            shutil.rmtree(world.root)
            shutil.copytree(place / "kept", world.root)
    return counts, faults


def table_of(counts: Mapping[tuple[str, str], int], inputs: int, seed: int) -> str:
    """Markdown: a line a kind, a column an outcome."""
    outcomes = ("refused", "right", "said", "fault")
    heads = (
        "input",
        "tried",
        "refused, exit code 2",
        "right result",
        "one line, exit code 1",
        "fault",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * 5]
    kinds = list(dict.fromkeys(kind for kind, _ in sorted(counts)))
    for kind in [*kinds, "all"]:
        cells = [
            sum(n for (k, o), n in counts.items() if o == outcome and kind in (k, "all"))
            for outcome in outcomes
        ]
        lines.append(f"| {kind} | {sum(cells)} | {' | '.join(map(str, cells))} |")
    return f"`python benchmarks/hostile.py --inputs {inputs} --seed {seed}`:\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
