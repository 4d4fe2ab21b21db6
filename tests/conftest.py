"""Tiny models, a tokenizer and rows, all made offline."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# The suite never needs a hub; a test that reached for one should fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

LONGEST = (
    "benchmark/test_build.py",
    "models/test_families.py",
    "training/test_resume.py",
    "training/test_engine_paths.py",
    "cli/test_sweep.py",
    "training/test_processes.py",
    "runs/test_run.py",
    "audits/test_audit_command.py",
    "test_examples.py",
    "web/test_page.py",
)
"""Files of tests that no worker should begin last, while the others wait for it."""
SHARED = Path(__file__).resolve().parents[2] / "shared"
FAMILIES = ("olmo", "olmo2", "llama", "qwen2", "gpt_neox")

NAMES = ("Ada", "Ben", "Cleo", "Dov", "Eva", "Finn", "Gus", "Hana")
TOWNS = ("Paris", "Oslo", "Lima", "Rome", "Cairo", "Delhi", "Quito", "Accra")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; the order within a file stays."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test that takes seconds for each: all but the quick ones are marked slow."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in quick else pytest.mark.slow,
        )
        for value in values
    ]


def make_rows(names: tuple[str, ...], offset: int = 0) -> list[dict[str, str]]:
    """One continuation and one question for each name, in two tasks, with LUME's ids."""
    rows = []
    for index, name in enumerate(names):
        town = TOWNS[(index + offset) % len(TOWNS)]
        code = f"90{index}-1{index}-77{offset}{index}"
        task = f"Task{index % 2 + 1}"
        document = f"{name.lower()}{offset}{index}"
        rows.append(
            {
                "id": f"{document}sc1",
                "input": f"{name} was born in a small house near the river of",
                "output": f"{town} and her number is {code}.",
                "task": task,
            }
        )
        rows.append(
            {
                "id": f"{document}qa0",
                "input": f"What is the number of {name}?",
                "output": code,
                "task": task,
            }
        )
    return rows


@pytest.fixture(scope="session", autouse=True)
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The secret of hashes, away from the user's own."""
    path = tmp_path_factory.mktemp("secret") / "secret"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_SECRET", str(path))
        yield path


@pytest.fixture(scope="session")
def forget_rows() -> list[dict[str, str]]:
    return make_rows(NAMES[:4])


@pytest.fixture(scope="session")
def retain_rows() -> list[dict[str, str]]:
    return make_rows(NAMES[4:], offset=3)


@pytest.fixture(scope="session")
def nonmember_rows() -> list[dict[str, str]]:
    return [row for row in make_rows(("Ida", "Jon", "Kai"), offset=5) if row["id"][:-1].endswith("sc")]


def refusal(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` raises: it must, on one line, in full sentences."""
    from expunge.errors import InputError

    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def load_benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package, as a module."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def row_files(
    tmp_path_factory: pytest.TempPathFactory,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
    nonmember_rows: list[dict[str, str]],
) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("rows")
    return {
        "forget": write_jsonl(directory / "forget.jsonl", forget_rows),
        "retain": write_jsonl(directory / "retain.jsonl", retain_rows),
        "nonmembers": write_jsonl(directory / "nonmembers.jsonl", nonmember_rows),
    }


@pytest.fixture(scope="session")
def tokenizer(forget_rows: list[dict[str, str]], retain_rows: list[dict[str, str]]) -> Any:
    """Byte-level BPE with an end-of-text and a padding token, and no BOS, as OLMo's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rows = forget_rows + retain_rows
    inner.train_from_iterator([f"{row['input']} {row['output']} A B C D" for row in rows], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=128
    )


CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe of help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As SmolLM2's: the turns, and a system prompt before them where the row has none."""


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed.chat_template = CHATML
    return changed


def with_ends(tokenizer: Any, template: str) -> Any:
    """The tokenizer with a BOS, or an EOS, that it adds itself, as Llama's does."""
    from tokenizers import AddedToken, processors

    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": AddedToken("<s>", special=True)})
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[("<s>", changed.bos_token_id), ("<|end|>", changed.eos_token_id)],
    )
    return changed


def tiny_model(family: str, vocabulary: int, layers: int = 4) -> Any:
    """A random model of a family: width 16, float32, seeded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if family not in ("gpt_neox",):
        sizes |= {"num_key_value_heads": 2, "tie_word_embeddings": True}
    config = AutoConfig.for_model(family, **sizes)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def shaken(model: Any, seed: int = 1) -> Any:
    """The model with weights so large that every layer, neighbour and position shows in its output.

    Freshly initialised, what a layer adds is a thousandth of what it is given.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * noise.to(parameter.dtype)
    return model


def passes_of(
    model: Any, batch_size: int, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Any:
    """A model's passes over examples, which need no tokenizer."""
    from expunge.data.tokenization import TextPolicy
    from expunge.evaluation.passes import Passes
    from expunge.processes import OneProcess

    return Passes(model, None, TextPolicy(128), batch_size, progress, OneProcess())


def random_examples(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[Any]:
    """Examples of random tokens whose second half is the answer; the first token is not counted."""
    import random

    from expunge.data.tokenization import Example

    draw = random.Random(seed)
    examples = []
    for number, length in enumerate(lengths):
        ids = tuple(draw.randrange(2, vocabulary) for _ in range(length))
        answer = tuple(position >= length // 2 for position in range(length))
        token = (False,) + (True,) * (length - 1)
        examples.append(Example(f"row{number}", "default", ids, token, answer))
    return examples


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """A directory with a saved tiny model of the asked family and its tokenizer."""
    made: dict[str, Path] = {}

    def directory(family: str = "olmo") -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            tiny_model(family, len(tokenizer)).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family] = path
        return made[family]

    return directory


@pytest.fixture(scope="session")
def memorised_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Any,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
) -> Path:
    """A tiny OLMo that has learned its rows by heart: greedy answers are right on both sides."""
    import torch

    from expunge.data.batches import collate
    from expunge.data.rows import as_rows
    from expunge.data.tokenization import TextPolicy, encode_rows
    from expunge.maths.numerics import masked_mean, token_log_probs

    model = tiny_model("olmo", len(tokenizer))
    rows = as_rows(forget_rows + retain_rows, "retain")
    examples = encode_rows(rows, tokenizer, TextPolicy(128), eos=True)
    batch = collate(examples, range(len(examples)), 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(300):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        log_probs = token_log_probs(logits, batch.input_ids)
        loss = -masked_mean(log_probs, batch.token_mask[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("memorised")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def quiz_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions in MMLU's file format, two of them for dev."""
    directory = tmp_path_factory.mktemp("mmlu")
    for split, suffix in (("test", "test"), ("dev", "dev")):
        (directory / split).mkdir()
        lines = [f"Which is {n}?,{n},1{n},2{n},3{n},A" for n in range(1, 3)]
        (directory / split / f"counting_{suffix}.csv").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, standard output, standard error."""
    from expunge.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def make_context(
    tokenizer: Any, forget_rows: list[dict[str, str]], retain_rows: list[dict[str, str]]
) -> Callable[..., Any]:
    """A tiny model with rows, ready for a method to start on."""
    import torch

    from expunge.data.rows import as_rows
    from expunge.data.tokenization import TextPolicy, encode_rows
    from expunge.methods.base import Context
    from expunge.models.decoder import find_layout

    def make(family: str = "olmo", seed: int = 0, layers: int = 4) -> Context:
        model = tiny_model(family, len(tokenizer), layers=layers)
        policy = TextPolicy(128)
        return Context(
            model=model,
            layout=find_layout(model),
            forget=encode_rows(as_rows(forget_rows, "forget"), tokenizer, policy, eos=False),
            retain=encode_rows(as_rows(retain_rows, "retain"), tokenizer, policy, eos=True),
            pad_id=1,
            batch_size=3,
            seed=seed,
            device=torch.device("cpu"),
            autocast=lambda: torch.autocast("cpu", enabled=False),
            progress=lambda _name, _done, _total: None,
        )

    return make


# Around an unlearning, for the audits: the oracle, and results that went right or wrong.


def learn(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    steps: int,
    learning_rate: float = 2e-2,
    chat_template: bool = False,
) -> Any:
    """Trains all weights on the rows, every row in each step."""
    from expunge.audits.tuning import tuned
    from expunge.data.rows import as_rows
    from expunge.data.tokenization import TextPolicy, encode_rows

    policy = TextPolicy(128, chat_template)
    examples = encode_rows(as_rows(rows, "retain"), tokenizer, policy, eos=True)
    for _ in tuned(
        model,
        examples,
        steps=steps,
        rows=len(rows),
        learning_rate=learning_rate,
        seed=0,
    ):
        pass
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str, Any], Path]:
    """Saves a model with the tokenizer."""

    def save(name: str, model: Any) -> Path:
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def oracle_dir(
    tokenizer: Any, retain_rows: list[dict[str, str]], saved: Callable[[str, Any], Path]
) -> Path:
    """A tiny OLMo that has learned the retain rows only."""
    model = learn(tiny_model("olmo", len(tokenizer)), tokenizer, retain_rows, 120)
    return saved("oracle", model)


def nudged(directory: Path) -> Any:
    """A model with weights changed so little that it says the same."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-4 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def nudged_dir(memorised_dir: Path, saved: Callable[[str, Any], Path]) -> Path:
    """The target under other weights."""
    return saved("nudged", nudged(memorised_dir))


@pytest.fixture(scope="session")
def forgetful_dir(oracle_dir: Path, saved: Callable[[str, Any], Path]) -> Path:
    """The oracle under other weights: an unlearned model that went right."""
    return saved("forgetful", nudged(oracle_dir))


@pytest.fixture(scope="session")
def ruined_dir(memorised_dir: Path, saved: Callable[[str, Any], Path]) -> Path:
    """The target with weights changed so much that nothing is left."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    return saved("ruined", model)


# Around the page and what it shows of a run.

HOSTILE = {
    "id": "<script>window.hit=1</script>",
    "input": 'A <img src=x onerror="window.hit=2"> ${window.hit=3} {{value}} was born in',
    "output": '<b>bold</b> & <script>window.hit=4</script> quoted "Oslo"',
    "task": "<i>Task3</i>",
}
"""A row that runs as a script wherever it is taken for markup."""


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory,
    memorised_dir: Path,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
) -> dict[str, Path]:
    """A finished run with scores and records, its row files, and scores of its target."""
    from expunge.cli.main import main

    directory = tmp_path_factory.mktemp("served")
    files = {
        "run": directory / "out <b>run",
        "target": directory / "out <b>run" / "before.json",
        "before": directory / "before.jsonl",
        "forget": write_jsonl(directory / "forget.jsonl", [*forget_rows, HOSTILE]),
        "retain": write_jsonl(directory / "retain.jsonl", retain_rows),
    }
    # A run names its target by its last part alone: the page finds it beside the run.
    (directory / memorised_dir.name).symlink_to(memorised_dir)
    rows = ["--forget", str(files["forget"]), "--retain", str(files["retain"]), "--quiet"]
    out = files["run"]
    method = ["--method", "gradient-difference", "--epochs", "6", "--learning-rate", "3e-3"]
    commands = [
        ["run", str(memorised_dir), "--output", str(out), *method, "--select", "last", *rows],
        ["evaluate", str(out), "--output", str(out / "scores.json"), "--records",
         str(out / "records.jsonl"), *rows],
        ["evaluate", str(memorised_dir), "--output", str(files["target"]), "--records",
         str(files["before"]), *rows],
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 0, command[0]
    return files


# Around the ledger of erasure requests.


def none_in(texts: Sequence[str], directory: Path) -> list[str]:
    """Searches every byte of every file below for the texts; returns the names of the files."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert [text for text in texts if text.encode() in content] == [], path
    return [path.name for path in files]


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """A ledger that is still to be made, in a directory of its own."""
    from expunge.ledger.store import LedgerPlace

    (tmp_path / "ledger").mkdir()
    return LedgerPlace(str(tmp_path / "ledger" / "ledger.db"), by="the tests")


@pytest.fixture
def subjects(tmp_path: Path, forget_rows: list[dict[str, str]]) -> list[Path]:
    """A forget file for each of four people: a continuation and a question."""
    return [
        write_jsonl(tmp_path / f"subject{number}.jsonl", forget_rows[2 * number : 2 * number + 2])
        for number in range(4)
    ]


@pytest.fixture
def asked(place: Any) -> Callable[..., Any]:
    """Adds a request to the ledger."""
    from expunge.ledger.receiving import Added, NewRequest, add

    def call(forget: Path, **said: Any) -> Added:
        return add(place, NewRequest(forget=str(forget), **said))

    return call
