"""Tasks of lm-evaluation-harness on the model that is measured: MMLU, ARC, HellaSwag, or the user's own.

Prompts, answers and metrics are the library's (https://github.com/EleutherAI/lm-evaluation-harness),
which the extra `harness` installs. The model, its context and the form of the text are the run's.
"""

from __future__ import annotations

import copy
import difflib
import importlib.metadata
import importlib.util
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expunge.data.chat_templates import dated
from expunge.errors import InputError, RunError, install
from expunge.evaluation.passes import Passes
from expunge.evaluation.score_values import read_mapping, read_score
from expunge.models.kernels import fast_products
from expunge.processes import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tasks = Mapping[str, Any]
"""What the library's TaskManager loads: `tasks` with their rows, `groups` and `group_map`."""
_SEED = 1234
"""Of the solved examples and of sampled answers; the library's own default."""
_LOGITS = 2**28
"""Logits of a batch: the library keeps those of every token, 1 GiB in float32."""
_MOST = sys.float_info.max
_BATCHES = 4
"""Batches of a share: answers to one question stand together there, and are read once."""


def read_tasks(names: str, include: str | Path | None = None) -> Tasks:
    """Loads the tasks of a comma-separated list with all of their rows, and renders every prompt.

    `include` is a directory with tasks of the user's, YAML files of the library's form. Raises
    InputError for a library that is not installed, an unknown name, and rows that cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"--harness: needs lm-eval, which is not installed; {install('harness')}")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError("--harness: names no task; give for example arc_easy,hellaswag")
    if include is not None and not Path(include).is_dir():
        raise InputError(f"--harness-include {include}: is no directory; give one with YAML tasks")
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _like_its_command():
        index = _index(wanted, include)
        for name in wanted:
            if name not in index.task_index:
                raise _unknown(name, index.all_tasks)
        for name in wanted:
            loaded = _loaded(index, name)
            found = {part: {**values, **loaded.get(part, {})} for part, values in found.items()}
    return found


def _index(wanted: Sequence[str], include: str | Path | None) -> Any:
    """The library's list of tasks; of the user's alone where they are all that is wanted."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False)
        if set(wanted) <= set(own.all_subtasks):
            return own  # the library's 14,000 files take seconds to read
    return TaskManager(include_path=include)


def _unknown(name: str, known: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    mend = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
    return InputError(f"--harness {name}: unknown; {mend}")


def _loaded(index: Any, name: str) -> Any:
    try:
        loaded = index.load([name])
        tasks = loaded["tasks"].values()
        for task in tasks:
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(_SEED)
            task.build_all_requests()
    except Exception as error:
        told, mend = type(error).__name__, "mend its YAML file or its rows"  # a message may quote a row
        if isinstance(error, ImportError):
            told, mend = str(error), "install what it needs"
        elif isinstance(error, OSError):
            told, mend = str(error), "put its file there, or get its rows from the hub"
        raise InputError(
            f"--harness {name}: cannot be loaded ({' '.join(told.split())}); {mend}, or leave it out"
        ) from None
    for task in tasks:
        _check(task)
    return loaded


def _check(task: Any) -> None:
    """Raises InputError for what the library would refuse, or count as wrong, once it has begun."""
    refusal = f"--harness {task.task_name}: "
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"{refusal}runs code that the model writes; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"{refusal}asks about images or sound; leave it out")
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "multiple_input"):
        return
    for number, row in enumerate(task.eval_docs, 1):
        choices = task.doc_to_choice(row)
        answer = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        for each in answer if isinstance(answer, list) else [answer]:
            if (isinstance(each, int) and not 0 <= each < len(choices)) or (
                isinstance(each, str) and each not in choices
            ):
                raise InputError(
                    f"{refusal}the answer of row {number} is none of its {len(choices)} choices; mend"
                    " the row, or doc_to_target in the task's YAML file"
                )


@contextmanager
def _like_its_command() -> Iterator[None]:
    """The seeds that tasks draw from are the library's; no bars, and no remarks, which quote rows."""
    import lm_eval.api.task
    import numpy as np

    drawn, numpy_drawn = random.getstate(), np.random.get_state()  # noqa: NPY002
    log = logging.getLogger("lm_eval")
    level, bar = log.level, lm_eval.api.task.tqdm
    log.setLevel(logging.CRITICAL)
    lm_eval.api.task.tqdm = lambda rows, **_: rows
    random.seed(0)
    np.random.seed(_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(numpy_drawn)  # noqa: NPY002
        random.setstate(drawn)
        lm_eval.api.task.tqdm = bar
        log.setLevel(level)


def run_tasks(tasks: Tasks, passes: Passes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores by task, as a scorecard holds them, and details: the library's version, the parts.

    A group with a metric of its own is one task, its members are `parts`. Several processes share the
    texts, each gets all scores. Raises RunError for a model whose losses are no numbers.
    """
    from lm_eval.evaluator import evaluate

    device = passes.model.device
    drawn = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with _like_its_command(), fast_products(passes.model.dtype, device), drawn:
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(_SEED)
        wrapped = _wrapped(passes)
        found = evaluate(
            wrapped,
            tasks,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=passes.policy.chat_template,
            fewshot_as_multiturn=True,
        )
    scores = {name: _scores(found, name) for name in sorted(found["results"])}
    scores = {name: score for name, score in scores.items() if score["metrics"]}
    parts = {part for name in scores for part in found["group_subtasks"].get(name, ())}
    details = {
        "version": importlib.metadata.version("lm_eval"),
        "texts": wrapped.read,
        "cut": sum(passes.processes.gather(wrapped.cut)),
        "parts": {name: score for name, score in scores.items() if name in parts},
    }
    return {name: score for name, score in scores.items() if name not in parts}, details


def _scores(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One task's entry; a metric behind a filter has the filter's name."""
    better = found["higher_is_better"].get(name, {})
    metrics: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        if not math.isfinite(value):
            raise RunError(
                f"--harness {name}: {metric} is no finite number; leave the task out, or measure with"
                " --dtype float32"
            )
        good = {True: "high", False: "low"}.get(better.get(metric), "-")
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        metrics[label] = {"value": float(value), "good": good}
    return {
        "rows": found["results"][name].get("sample_len"),
        "shots": found["n-shot"].get(name),
        "version": found["versions"].get(name),
        "metrics": metrics,
    }


def read_entries(values: object) -> dict[str, Any]:
    """Reads the scores by task from a score file. Raises InputError that names what is none."""
    entries = read_mapping("harness", values)
    for task, entry in entries.items():
        place = f"harness {task}"
        for metric, told in read_mapping(place, read_mapping(place, entry).get("metrics")).items():
            score = read_mapping(f"{place} {metric}", told)
            read_score(f"{place} {metric}", score.get("value"), -_MOST, _MOST)
            if score.get("good") not in ("high", "low", "-"):
                raise InputError(
                    f"{place} {metric}: does not say whether high or low is good; measure it anew with"
                    " expunge evaluate"
                )
    return dict(entries)


def _tokenizer_for(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy: the library gives it a padding token; its template is told the date that ours is."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = dated(tokenizer) or tokenizer.chat_template
    return copied


def _wrapped(passes: Passes) -> Any:
    """The model as the library calls one."""
    from lm_eval.models.huggingface import HFLM

    class Shared(HFLM):
        """Processes share the texts; those that are longer than the context lose their start."""

        read = 0
        cut = 0
        """All texts, and those of this process's share that lost their start."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> Any:
            lengths = [len(context) + len(answer) for _, context, answer in requests]
            if max((len(answer) for *_, answer in requests), default=0) > self.max_length:
                raise InputError(
                    f"--harness: an answer is longer than the context of {self.max_length} tokens;"
                    " leave its task out"
                )
            vocabulary = passes.policy.vocabulary or len(self.tokenizer)
            answered = super()._loglikelihood_tokens

            def answer(chunk: Sequence[int]) -> Any:
                self.cut += sum(lengths[i] > self.max_length + 1 for i in chunk)
                longest = min(max(lengths[i] for i in chunk), self.max_length)
                most = max(1, _LOGITS // (longest * vocabulary))
                self.batch_size_per_gpu = min(passes.batch_size, most)
                found = answered([requests[i] for i in chunk], disable_tqdm=True)
                if any(math.isnan(log_prob) for log_prob, _ in found):
                    raise RunError(
                        "--harness: the model's loss is no number; measure another checkpoint, or with"
                        " --dtype float32"
                    )
                return found

            contexts = [context for _, context, _ in requests]
            order = sorted(range(len(requests)), key=lambda i: (-len(contexts[i]), contexts[i]))
            return self._in_shares(order, answer)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            written = super().generate_until

            def write(chunk: Sequence[int]) -> Any:
                self.batch_size_per_gpu = passes.batch_size
                return written([requests[i] for i in chunk], disable_tqdm=True)

            order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
            return self._in_shares(order, write)

        def tok_batch_encode(
            self, strings: Any, padding_side: Any = "left", left_truncate_len: Any = None, **more: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, padding_side, **more)
            kept = left_truncate_len or ids.shape[1]
            self.cut += int((mask.sum(1) > kept).sum())
            return ids[:, -kept:], mask[:, -kept:]

        def _in_shares(self, order: Sequence[int], run: Callable[[Sequence[int]], Any]) -> list[Any]:
            found: dict[int, Any] = {}
            self.read += len(order)
            size = _BATCHES * passes.batch_size
            chunks = [order[start : start + size] for start in range(0, len(order), size)]
            with passes.phase("harness", len(order)) as advance:
                for chunk in chunks[passes.processes.rank :: passes.processes.count]:
                    torch.manual_seed(_SEED)
                    found |= zip(chunk, run(chunk), strict=True)
                    advance(len(chunk))
                return gathered(passes.processes, found)

    return Shared(
        passes.model,
        tokenizer=_tokenizer_for(passes.tokenizer),
        max_length=passes.policy.context,
        softmax_dtype=torch.float32,
    )
