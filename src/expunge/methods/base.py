"""What a method is: settings that check themselves, and the objective they start on a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import nn

from expunge.data.batches import Batch, Tokens, in_order
from expunge.data.rows import Row
from expunge.data.sampling import Sampling
from expunge.data.tokenization import Example
from expunge.errors import InputError
from expunge.maths.calibration import NeverSeen
from expunge.maths.numerics import by_pieces, target_log_probs, target_surprise
from expunge.models.decoder import DecoderLayout
from expunge.processes import OneProcess, Processes
from expunge.segments.engine import SegmentEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Schedule = Literal["constant", "cosine", "trapezoid"]
_REFERENCE_WIDTH = 256
_MOST_RANDOM_ROWS = 2**20


@dataclass(frozen=True)
class Terms:
    """One step's loss in its two parts, as they enter it; each a scalar."""

    forget: torch.Tensor
    retain: torch.Tensor | None

    @property
    def total(self) -> torch.Tensor:
        """Their sum."""
        return self.forget if self.retain is None else self.forget + self.retain


class Whitening(NamedTuple):
    """What makes the inputs of a linear map white on held text (`whitening`)."""

    matrix: torch.Tensor
    """(inputs, inputs)."""
    turned: bool = False
    """Whether the map holds its weight as (inputs, outputs)."""


@dataclass(frozen=True)
class OptimizerSpec:
    """Which optimiser the loop builds, with its options."""

    name: Literal["adamw", "muon", "sgd", "sophia"] = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    curvature_interval: int | None = None
    """Steps between two estimates of the curvature, for Sophia."""
    in_backward: bool = False
    """Whether each parameter moves in the backward pass, as soon as its gradient is whole; none is
    clipped then."""
    rate_scale: float = 1.0
    """What the run's learning rate is multiplied by, so that a rate means much the same to every
    optimiser."""
    whitening: Mapping[str, Whitening] = field(default_factory=dict)
    """By the name of a trained matrix what makes its inputs white, for Muon."""


@dataclass(frozen=True)
class Preset:
    """Published settings: what the method takes, what the run takes, and where they come from."""

    method: Mapping[str, Any]
    run: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class RunDefaults:
    """What `run` uses where the user says nothing."""

    epochs: int
    batch_size: int
    learning_rate: float
    """At a hidden size of 256; scaled by 256 / hidden size (arXiv 2203.03466, Adam)."""
    depth: int | None = None
    """Layers from which the learning rate is also scaled by depth / layers, as each of them adds its
    step to the same states; None: never."""
    schedule: Schedule = "constant"
    least_steps: int = 1
    """More epochs are made of a forget set that is too small for as many."""
    most_epochs: int | None = None
    """But not more than so many; then each step is smaller. None: no limit."""
    candidates: int = 10
    """Checkpoints that are measured, at equal distances."""

    def epochs_of(self, steps_an_epoch: int) -> int:
        """The default number of epochs where one takes so many steps."""
        enough = -(-self.least_steps // steps_an_epoch)
        return max(self.epochs, min(enough, self.most_epochs or enough))

    def learning_rate_at(self, width: int, layers: int, steps_an_epoch: int) -> float:
        """The default learning rate for a model of this hidden size and so many layers.

        A step is as long for one row as for many, and what it changes beyond the row other rows lose.
        So with s of n least steps it is shorter by the root of s / n (docs/decisions.md).
        """
        by_depth = 1.0 if self.depth is None else min(1.0, self.depth / layers)
        steps = self.epochs_of(steps_an_epoch) * steps_an_epoch
        by_steps = min(1.0, steps / self.least_steps) ** 0.5
        return self.learning_rate * _REFERENCE_WIDTH / width * by_depth * by_steps


@dataclass(frozen=True)
class Context:
    """What a method is given to start: the model, the rows and how to run them."""

    model: PreTrainedModel
    layout: DecoderLayout
    forget: Sequence[Example]
    retain: Sequence[Example]
    """Empty where the user has no retain set."""
    pad_id: int
    batch_size: int
    seed: int
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    progress: Callable[[str, int, int], None]
    """Called with a phase's name, what is done and what there is to do."""
    engine: SegmentEngine | None = None
    """Runs the trained layers alone; None where the whole model runs."""
    processes: Processes = field(default_factory=OneProcess)
    """Those that share the rows of every step."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the method draws its rows."""
    preferred: Sequence[Example] = ()
    """What is to be said in the place of each forget example; empty unless the method names some."""
    resumed: Mapping[str, Any] | None = None
    """The notes of a start whose parameters and optimiser will be put back; None for a new run."""
    measures: bool = True
    """Whether the run measures candidates. Only then may a method ask for `next_tokens`: a run that does
    not has no layers above the trained ones in memory."""

    def next_tokens(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token and whether greedy decoding gives it: (rows, tokens - 1).

        Entries of padding have no meaning.
        """
        if self.engine is not None:
            return self.engine.next_tokens(batch)
        return self.next_tokens_with_surprise(batch, None)[:2]

    def next_tokens_with_surprise(
        self, batch: Batch, where: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`next_tokens` of the whole model, and the surprise at the tokens marked in `where`.

        where (rows, tokens - 1), boolean -> (marked,), in reading order (`target_surprise`). Not where
        an engine runs the trained layers alone.
        """
        logits = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        # The last place predicts nothing, but without it the logits would have to be copied.
        targets = batch.input_ids.roll(-1, dims=1)
        asked = torch.zeros_like(targets).bool()
        if where is not None:
            asked[:, :-1] = where
        found = _next_tokens(*(values.flatten(0, 1) for values in (logits, targets, asked)))
        log_probs, right, surprise = (part.view_as(targets)[:, :-1] for part in found)
        return log_probs, right, surprise[asked[:, :-1]]

    def passes(self, examples: Sequence[Example], phase: str | None) -> Iterator[Batch]:
        """The examples batch by batch on the device; a phase's name tells its progress."""
        done = 0
        for batch in in_order(examples, self.batch_size, self.pad_id):
            yield batch.to(self.device)
            done += len(batch.indices)
            if phase is not None:
                self.progress(phase, done, len(examples))

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator of its own for each purpose, so that draws do not depend on each other."""
        return generator_of(self.seed, purpose)

    def seed_of(self, purpose: str) -> int:
        """The same for what draws from torch's global generator."""
        return self.generator(purpose).initial_seed() % 2**63


@by_pieces
def _next_tokens(
    logits: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each target's log-probability, whether it is the likeliest, and its surprise where asked."""
    surprise = torch.zeros_like(targets, dtype=torch.float32)
    surprise[asked] = target_surprise(logits[asked], targets[asked])
    likeliest = logits.max(-1).indices  # three times as fast as argmax on a CPU
    return target_log_probs(logits, targets), likeliest == targets, surprise


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """The generator of a purpose, a function of the seed."""
    digest = sum(ord(c) * 131**i for i, c in enumerate(purpose)) % 2**31
    return torch.Generator().manual_seed(seed * 2**31 + digest)


class Objective(Protocol):
    """A method at work on a model: what is trained and the loss of a step.

    What has a body here is what most methods do.
    """

    optimizer: OptimizerSpec
    parameters: Mapping[str, nn.Parameter]
    """The trained tensors, float32, by name."""

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """The loss of one step, differentiable in `parameters`."""

    def forget_size(self, batch: Batch) -> float:
        """What the forget term of a batch is a mean over: its counted tokens, rows or weights."""

    def retain_size(self, batch: Batch) -> float:
        """The same of the retain term."""

    def curvature(self, batch: Batch) -> list[torch.Tensor]:
        """Estimate of the loss's diagonal Hessian in the order of `parameters`; none but for Sophia."""
        return []

    def initial_curvature(self) -> list[torch.Tensor] | None:
        """What Sophia starts from, if anything."""
        return None

    @property
    def calibration(self) -> Mapping[str, Any]:
        """How hard calibrated rows are pushed, as JSON; what a resumed run goes on with."""
        return {}

    @property
    def state_tensors(self) -> Mapping[str, torch.Tensor]:
        """What a resumed run goes on with beside `calibration`, the parameters and the optimiser."""
        return {}

    def restore(self, calibration: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `calibration` and `state_tensors` were."""
        return

    def calibrate(self, rows: NeverSeen) -> None:
        """Pushes each row harder or less, as its loss is under or over that of a never-seen one.

        Else all rows alike.
        """
        return

    def set_training(self, active: bool) -> None:
        """Switches what differs between a training step and a measurement (adapter dropout)."""
        return

    def notes(self) -> Mapping[str, Any]:
        """What the manifest records of the start: measured values only, never text."""

    def artifacts(self) -> Mapping[str, torch.Tensor]:
        """Tensors that are saved beside the model, such as steering directions."""
        return {}

    def finish(self, *, keep_adapter: bool) -> Finished:
        """Leaves the model plain, carrying the result, and returns the changed weights."""


@dataclass(frozen=True)
class Finished:
    """The result as tensors."""

    weights: Mapping[str, torch.Tensor]
    """Every changed weight in float32 on the CPU, by its name in the checkpoint."""
    adapter: Mapping[str, torch.Tensor] | None = None
    adapter_config: Mapping[str, Any] | None = None


def check_numbers(settings: Any) -> None:
    """Raises InputError for a decimal number of a method's settings that is nan, infinite or below 0."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if "float" in str(each.type) and value is not None and not 0 <= value < math.inf:
            said = "0 or more" if value < 0 else "a finite number"
            raise InputError(f"--method.{each.name} {value}: must be {said}")


def check_random_rows(count: int) -> None:
    """Raises InputError for a number of rows of random tokens that nobody could hold."""
    if not 0 <= count <= _MOST_RANDOM_ROWS:
        raise InputError(
            f"--method.random_rows {count}: must be 0 or more, and {_MOST_RANDOM_ROWS:,} at most"
        )


class Method(Protocol):
    """A method's settings: a frozen dataclass, whose fields are the options `--method.<field>`.

    What has a body here is what most methods say.
    """

    name: ClassVar[str]
    defaults: ClassVar[RunDefaults]
    presets: ClassVar[Mapping[str, Preset]] = {}
    whole_steps: ClassVar[bool] = False
    """Whether all forget rows of a step must be in one pass, and so in one process."""

    @property
    def needs_retain(self) -> bool:
        """Whether the loss has a retain term."""

    @property
    def random_rows(self) -> int:
        """How many rows of random tokens are held beside the retain set.

        0 where a random token has no loss worth holding.
        """
        return 0

    @property
    def sampling(self) -> Sampling:
        """How rows are drawn: as many retain rows as forget rows, all of them in turn."""
        return Sampling()

    @property
    def matches_tokens(self) -> Tokens | None:
        """Which tokens' spread inside documents calibration wants; None: the documents' means alone."""
        return None

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter to keep."""
        return False

    def preferred(self, forget: Sequence[Row], retain: Sequence[Row], seed: int) -> Sequence[Row]:
        """What is to be said in the place of each forget row, by its id; empty: nothing is."""
        return ()

    def check(self, layout: DecoderLayout) -> None:
        """Raises InputError for settings that this model cannot take; no weights are needed."""

    def trained_layers(self, layout: DecoderLayout) -> tuple[int, int] | None:
        """The first and last layer that a step runs, for a loss on the last one's output.

        None where a step needs the whole model.
        """
        return None

    def sharded_weights(self, layout: DecoderLayout) -> Sequence[str]:
        """Names of weights in the decoder's layers that are trained in full and may be sharded.

        None where an adapter is trained, or weights whose values from before are exchanged with them.
        """
        return ()

    def start(self, context: Context) -> Objective:
        """Makes the model ready and returns the objective."""
