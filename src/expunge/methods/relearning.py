"""An attack by relearning that goes on beside the training, so that forgetting outlasts it.

Tuning on some forgotten subjects brings others back where forgetting only covers what is still there
(arXiv 2410.08827). Tamper-resistant training (arXiv 2408.00761) asks for the loss that is left after an
attacker's steps, and takes the gradient at the attacked weights for that of the weights themselves
(first order, as arXiv 1803.02999). Here the attacker is not run anew for every step of training: it
takes one step of Adam beside each, from where it was, on the subjects that it is shown, and starts again
from the trained weights, with other subjects, after some steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from expunge.data.rows import document_of
from expunge.processes import Processes

_BETAS = (0.9, 0.95)
_EPS = 1e-8
_KINDS = ("offset", "mean", "square")


class Relearner:
    """The attacker: how far it has moved the trained parameters, and what it has learned from."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        documents: Iterable[str],
        rate: float,
        steps: int,
        generator: Callable[[str], torch.Generator],
        processes: Processes,
    ) -> None:
        """`documents` are the forget set's, `rate` is Adam's, `steps` how many an attack has.

        `generator` gives one for each purpose; what the `processes` collect is learned by all of them.
        """
        self._parameters = parameters
        self._documents = sorted(documents)
        self._rate, self._steps, self._generator = rate, steps, generator
        self._processes = processes
        self._state = {
            kind: {name: torch.zeros_like(p) for name, p in parameters.items()} for kind in _KINDS
        }
        self._sums = [torch.zeros_like(p) for p in parameters.values()]
        self._tokens = 0
        self._attack = 0
        self._steps_gone = 0
        self._steps_learned = 0
        """Fewer, where it was shown nothing."""

    def factors(self) -> dict[str, nn.Parameter]:
        """The parameters as the attacker has moved them; trainable copies."""
        offset = self._state["offset"]
        return {n: nn.Parameter(p.detach() + offset[n]) for n, p in self._parameters.items()}

    def is_shown(self, row_ids: Sequence[str]) -> list[bool]:
        """Which rows the attacker learns from: all of half of the documents, rounded down."""
        generator = self._generator(f"relearn {self._attack}")
        order = torch.randperm(len(self._documents), generator=generator).tolist()
        shown = {self._documents[place] for place in order[: len(order) // 2]}
        return [document_of(row) in shown for row in row_ids]

    def collect(self, gradients: Sequence[torch.Tensor], tokens: int) -> None:
        """Adds gradients of the summed loss of so many tokens, in the order of the parameters."""
        for total, gradient in zip(self._sums, gradients, strict=True):
            total.add_(gradient)
        self._tokens += tokens

    def end_step(self) -> None:
        """Learns from what was collected in a step of the training; after its last, starts anew."""
        tokens = sum(self._processes.gather(self._tokens))
        self._processes.sum(self._sums)
        if tokens:
            self._learn(tokens)
        for total in self._sums:
            total.zero_()
        self._tokens = 0
        self._steps_gone += 1
        if self._steps_gone == self._steps:
            for tensors in self._state.values():
                for tensor in tensors.values():
                    tensor.zero_()
            self._attack, self._steps_gone, self._steps_learned = self._attack + 1, 0, 0

    @torch.no_grad()
    def _learn(self, tokens: int) -> None:
        """One step of Adam without decay, with bias correction (arXiv 1412.6980, algorithm 1)."""
        self._steps_learned += 1
        first, second = (1 - beta**self._steps_learned for beta in _BETAS)
        for name, total in zip(self._parameters, self._sums, strict=True):
            offset, mean, square = (self._state[kind][name] for kind in _KINDS)
            gradient = total / tokens
            mean.mul_(_BETAS[0]).add_(gradient, alpha=1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            offset.addcdiv_(mean, (square / second).sqrt() + _EPS, value=-self._rate / first)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it has learned, by name; between two steps."""
        return {
            f"{kind}.{name}": tensor
            for kind, tensors in self._state.items()
            for name, tensor in tensors.items()
        }

    def facts(self) -> dict[str, Any]:
        """The rest of its state, as JSON can hold it."""
        return {
            "attack": self._attack,
            "steps_gone": self._steps_gone,
            "steps_learned": self._steps_learned,
        }

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `facts` and `tensors` gave."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self._attack, self._steps_gone = facts["attack"], facts["steps_gone"]
        self._steps_learned = facts["steps_learned"]
