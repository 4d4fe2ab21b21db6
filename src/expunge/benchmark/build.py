"""The benchmark on disk: its rows, the target model that memorised them, and the oracle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from expunge.benchmark.generator import Benchmark, BenchmarkSettings, generate, write_benchmark
from expunge.benchmark.recipe import (
    PretrainingSettings,
    Progress,
    oracle_texts,
    target_texts,
    tokenizer_texts,
)
from expunge.data.formats import sha256_of
from expunge.disk import write_whole
from expunge.errors import InputError

logger = logging.getLogger(__name__)

VERSION = 3
"""Raised when the code changes what the same settings give."""
RECORD = "benchmark.json"


@dataclass(frozen=True)
class BuiltBenchmark:
    """Where the parts of a complete benchmark are."""

    directory: Path

    @property
    def forget(self) -> Path:
        """Rows that the target knows and the oracle does not."""
        return self.directory / "forget.jsonl"

    @property
    def retain(self) -> Path:
        """Rows that both know."""
        return self.directory / "retain.jsonl"

    @property
    def nonmembers(self) -> Path:
        """Text that neither knows, to measure membership with."""
        return self.directory / "nonmembers.jsonl"

    @property
    def calibration(self) -> Path:
        """Text that neither knows, to calibrate runs with."""
        return self.directory / "calibration.jsonl"

    @property
    def paraphrases(self) -> Path:
        """The forget questions in other words."""
        return self.directory / "paraphrases.jsonl"

    @property
    def mmlu(self) -> Path:
        """General questions, in the format of MMLU."""
        return self.directory / "mmlu"

    @property
    def target(self) -> Path:
        """The model that knows all rows."""
        return self.directory / "target"

    @property
    def oracle(self) -> Path:
        """The model that was trained without the forget rows."""
        return self.directory / "oracle"


def content_hash(settings: BenchmarkSettings, pretraining: PretrainingSettings | None = None) -> str:
    """SHA-256 of everything that the rows and the models follow from."""
    pretraining = pretraining or PretrainingSettings(seed=settings.seed)
    return _content_hash(generate(settings), settings, pretraining)


def default_directory(
    settings: BenchmarkSettings, pretraining: PretrainingSettings | None = None
) -> Path:
    """The place of this benchmark under $EXPUNGE_CACHE or ~/.cache/expunge."""
    cache = os.environ.get("EXPUNGE_CACHE")
    parent = Path(cache) if cache else Path.home() / ".cache" / "expunge"
    return parent / f"benchmark-{content_hash(settings, pretraining)[:12]}"


def build(
    directory: Path,
    settings: BenchmarkSettings,
    progress: Progress = lambda stage, done, total: None,
    pretraining: PretrainingSettings | None = None,
) -> BuiltBenchmark:
    """Write the benchmark to the directory, or reuse it if it is there, complete and unchanged.

    The directory appears when everything is in it. The models are seeded as the rows are unless
    `pretraining` says otherwise.

    Raises:
        InputError: the directory holds anything else.
    """
    pretraining = pretraining or PretrainingSettings(seed=settings.seed)
    benchmark = generate(settings)
    content = _content_hash(benchmark, settings, pretraining)
    if _holds(directory, content):
        return BuiltBenchmark(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}")
    staging.mkdir()
    try:
        write_benchmark(benchmark, staging)
        training = _train(benchmark, pretraining, staging, progress)
        record = {
            "content_hash": content,
            "version": VERSION,
            "settings": asdict(settings),
            "pretraining": asdict(pretraining),
            "training": training,
            "versions": _versions(),
            "files": _digests(staging),
        }
        write_whole(staging / RECORD, json.dumps(record, indent=2) + "\n")
        _move(staging, directory, content)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return BuiltBenchmark(directory)


def _train(
    benchmark: Benchmark, settings: PretrainingSettings, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Write the target model and the oracle; return how their trainings went.

    Both at once, each in a thread that computes with one: such small models keep no second core busy,
    and the weights do not depend on how many cores there are.
    """
    import torch

    from expunge.benchmark.pretraining import train_model, train_tokenizer

    tokenizer = train_tokenizer(tokenizer_texts(benchmark), settings)
    texts = {
        "target": target_texts(benchmark, settings),
        "oracle": oracle_texts(benchmark, settings),
    }
    given_up = threading.Event()

    def watched(stage: str, done: int, total: int) -> None:
        if given_up.is_set():
            raise InterruptedError
        progress(stage, done, total)

    results = {}
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(len(texts)) as pool:
        trainings = {
            name: pool.submit(train_model, seen, tokenizer, settings, watched, name)
            for name, seen in texts.items()
        }
        try:
            for name, training in trainings.items():
                model, result = training.result()
                if result.accuracy < 1:
                    share = 100 * result.accuracy
                    logger.warning("the %s has memorised %.2f%% of its texts", name, share)
                model.save_pretrained(directory / name)
                tokenizer.save_pretrained(directory / name)
                results[name] = asdict(result)
        finally:
            given_up.set()
            torch.set_num_threads(threads)
    return results


def _content_hash(
    benchmark: Benchmark, settings: BenchmarkSettings, pretraining: PretrainingSettings
) -> str:
    content = [VERSION, asdict(settings), asdict(pretraining), asdict(benchmark)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _holds(directory: Path, content: str) -> bool:
    """Whether the directory is this benchmark; False if there is nothing.

    Raises:
        InputError: the directory is anything else.
    """
    mend = "choose another directory or delete it"
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise InputError(f"{directory} is a file: {mend}")
    if not any(directory.iterdir()):
        return False
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        found, files = str(record["content_hash"]), dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{directory} holds files but no valid {RECORD}: {mend}") from error
    if found != content:
        raise InputError(f"{directory} holds a benchmark of other settings ({found[:12]}): {mend}")
    for name, digest in files.items():
        path = directory / name
        if not path.is_file() or sha256_of(path) != digest:
            raise InputError(f"{path} is missing or was changed since the benchmark was built: {mend}")
    return True


def _move(staging: Path, directory: Path, content: str) -> None:
    try:
        staging.replace(directory)
    except OSError:
        # Another process may have built the same benchmark in the meantime.
        if not _holds(directory, content):
            raise


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): sha256_of(path) for path in files}


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("expunge", "torch", "transformers", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions
