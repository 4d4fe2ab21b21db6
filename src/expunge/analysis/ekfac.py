"""EK-FAC's factors of some linear maps, fitted by kronfluence (Grosse et al., arXiv 2308.03296)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expunge.analysis.row_gradients import (
    Labels,
    RowGradients,
    Windows,
    block_shape,
    drawn_labels,
    wide,
)
from expunge.data.batches import collate
from expunge.errors import InputError, install
from expunge.methods.curvature import Eigenbasis, EigenbasisCurvature
from expunge.methods.forward import all_logits
from expunge.methods.numerics import target_log_probs

if TYPE_CHECKING:
    from kronfluence.task import Task


def check_ekfac(maps: Mapping[str, nn.Module]) -> None:
    """Raises InputError where kronfluence is not installed or does not know a map's type."""
    if find_spec("kronfluence") is None:
        raise InputError(f"--curvature ekfac: needs kronfluence; {install('ekfac')}")
    for name, module in maps.items():
        if not isinstance(module, nn.Linear):
            raise InputError(
                f"--curvature ekfac: {name} is a {type(module).__name__}, and EK-FAC is for Linear"
                " maps; use --curvature diagonal"
            )


def fit_ekfac(
    passes: RowGradients,
    rows: Sequence[Windows],
    labels: Labels,
    seed: int,
    report: Callable[[str, int, int], None],
) -> EigenbasisCurvature:
    """The Fisher of the mean token loss over the rows, in the eigenbasis of each map's factors.

    Two passes, one for the bases and one for the eigenvalues; each window counts as a row of its own.
    Raises InputError as `check_ekfac` does. The factors are on disk meanwhile, in a directory that goes.
    """
    check_ekfac(passes.maps)
    from kronfluence.analyzer import Analyzer
    from kronfluence.arguments import FactorArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    examples = sorted((w for row in rows for w in row), key=lambda example: -len(example))
    tokens = passes.counted(rows)
    model = passes.model

    def batch_of(places: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = collate(examples, places, passes.pad_id)
        return {
            "place": torch.tensor(places),
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "counted": batch.mask(passes.tokens),
        }

    with (
        TemporaryDirectory(prefix="expunge-ekfac-") as scratch,
        _wrapped(model, _task(list(passes.maps), seed, report, len(examples))) as task,
        _quiet(),
    ):
        analyzer = Analyzer(
            "factors",
            model,
            task,
            cpu=model.device.type == "cpu",
            disable_tqdm=True,
            output_dir=scratch,
        )
        settings = FactorArguments(
            use_empirical_fisher=labels == "data",
            covariance_max_examples=None,
            lambda_max_examples=None,
        )
        for name in ("activation_covariance", "gradient_covariance", "per_sample_gradient"):
            setattr(settings, f"{name}_dtype", wide(torch.empty(0, dtype=model.dtype)).dtype)
        settings.lambda_dtype = settings.per_sample_gradient_dtype
        analyzer.fit_all_factors(
            "ekfac",
            range(len(examples)),
            per_device_batch_size=min(passes.batch_size, len(examples)),
            dataloader_kwargs=DataLoaderKwargs(collate_fn=batch_of),
            factor_args=settings,
        )
        bases: Any = analyzer.load_eigendecomposition("ekfac")
        eigenvalues: Any = analyzer.load_lambda_matrices("ekfac")
    first = next(iter(passes.maps.values())).get_parameter("weight")
    like = {"device": first.device, "dtype": wide(first.detach()[:0]).dtype}
    found = EigenbasisCurvature(
        {
            name: Eigenbasis(
                bases["gradient_eigenvectors"][name].to(**like),
                bases["activation_eigenvectors"][name].to(**like),
            )
            for name in passes.maps
        },
        {name: eigenvalues["lambda_matrix"][name].to(**like) / tokens for name in passes.maps},
    )
    for name, module in passes.maps.items():
        assert found.eigenvalues[name].shape == block_shape(module)
    return found


def _task(
    maps: Sequence[str], seed: int, report: Callable[[str, int, int], None], rows: int
) -> Task:
    """What kronfluence asks of a model: the summed loss of a batch, on its labels or drawn ones."""
    from kronfluence.task import Task

    class LanguageModelling(Task):
        done = 0

        def compute_train_loss(
            self, batch: Any, model: nn.Module, sample: bool = False
        ) -> torch.Tensor:
            where = batch["counted"][:, 1:]
            logits: Any = all_logits(model, batch["input_ids"], batch["attention_mask"])
            chosen = logits[:, :-1][where]
            targets = batch["input_ids"][:, 1:][where]
            if sample:
                seeds = [seed * 2**31 + int(place) for place in batch["place"]]
                targets = drawn_labels(chosen, where.sum(1).tolist(), seeds)
            self.done += len(where)
            report("EK-FAC", min(self.done, 2 * rows), 2 * rows)
            return -target_log_probs(chosen, targets).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(maps)

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            mask: torch.Tensor = batch["attention_mask"]
            return mask

    return LanguageModelling()


@contextmanager
def _wrapped(model: nn.Module, task: Task) -> Iterator[Task]:
    """kronfluence's wrappers around the maps, gone after the body; no parameter keeps a gradient."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.module.tracked_module import TrackedModule

    wanted = [parameter.requires_grad for parameter in model.parameters()]
    try:
        prepare_model(model, task)
        yield task
    finally:
        for name, module in list(model.named_modules()):
            if isinstance(module, TrackedModule):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.original_module)
        for parameter, want in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing below an error is said: the library describes the model and the data at length."""
    logger = logging.getLogger("kronfluence")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
