"""Everything about a run that needs no weights: rows checked, tokenised, split; options resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from expunge.analysis.influence_file import (
    RowsAtRisk,
    check_same_rows,
    read_influence,
)
from expunge.analysis.layers import LayerChoice
from expunge.analysis.template_choice import evenly
from expunge.data.batches import PAD_ID
from expunge.data.random_text import LENGTH, random_examples
from expunge.data.rows import Row, RowSet, as_rows, check_disjoint, documents
from expunge.data.tokenization import Example, TextPolicy, count_windowed, encode_rows
from expunge.errors import InputError
from expunge.methods.base import Method
from expunge.methods.counterfactuals import exchanged
from expunge.methods.preference import encode_beside
from expunge.methods.retrain import Retrain
from expunge.models.decoder import DecoderLayout
from expunge.models.loading import CheckedModel
from expunge.models.text_forms import context_of, policies_of, vocabulary_of
from expunge.training.influence import InfluenceUsed, applied
from expunge.training.options import Resolved, TrainingOptions, resolved
from expunge.training.validation import ValidationSet, drawn_nonmembers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_VALIDATION_ROWS = 64
_KEPT_OUT = 0.02
_FEWEST_KEPT_OUT = 16
"""Fewer say nothing and are harmed for nothing (docs/decisions.md)."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin on a model."""

    method: Method
    options: TrainingOptions
    used: Resolved
    """The loop's options with every default filled in."""
    policy: TextPolicy
    text: Mapping[str, Any]
    """How rows became tokens."""
    sample: tuple[Sequence[Row], Sequence[Row]]
    """Forget and retain rows that `--chat-template auto` reads."""
    forget: Sequence[Example]
    """To retrain, the rows that are learned: those to keep."""
    retain: Sequence[Example]
    """What is trained on, rows of random tokens included; empty without a retain set."""
    validation: ValidationSet
    retain_kept_out: bool
    pad_id: int
    warnings: Sequence[str]
    has_template: bool
    """Whether the tokenizer has a chat template."""
    layer_choice: LayerChoice | None = None
    """How the method's layer was chosen; None where it was given."""
    influence: InfluenceUsed | None = None
    """None without --influence."""
    plain: Prepared | None = None
    """The same run without the chat template, where the weights decide whether it is on."""
    base: CheckedModel | None = None
    """The model from before the fine-tune, where it is given."""
    asks_base: bool = False
    """Whether it says of the forget rows what is wanted of them."""
    counterfactuals: Sequence[Sequence[Example]] = ()
    """Two versions of the forget documents (`exchanged`); empty where other text says how far to go."""
    preferred: Sequence[Example] = ()
    """What is to be said in the place of each forget example; empty unless the method names some."""

    @property
    def retrains(self) -> bool:
        """Whether rows are learned, from the base on, and none unlearned."""
        return isinstance(self.method, Retrain)

    @property
    def yardstick(self) -> Literal["nonmembers", "base", "counterfactuals", "ceiling"] | None:
        """What says where unlearning ends: non-members, the base's losses on the forget rows,
        counterfactuals of them, or none, and then the method's settings. None: nothing is unlearned."""
        if self.retrains:
            return None
        if not (self.measures and self.validation.members):
            return "ceiling"
        if self.asks_base:
            return "base"
        return "counterfactuals" if self.counterfactuals else "nonmembers"

    def changed(self, target: CheckedModel) -> CheckedModel:
        """The checkpoint that the run changes: the target, or to retrain the base."""
        return self.base if self.retrains and self.base is not None else target

    @property
    def measures(self) -> bool:
        """Whether candidates are measured during the run."""
        return self.used.validate_every is not None

    @property
    def looks(self) -> bool:
        """Whether a sample says what the target knows, as nothing is measured later."""
        return not (self.measures or self.retrains) and self.options.unknown_rows == "refuse"

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            **asdict(self.used),
            "text": dict(self.text),
            "validation_rows": {
                "forget": len(self.validation.forget),
                "retain": len(self.validation.retain),
                "retain_kept_out": self.retain_kept_out,
                "nonmembers": 0 if self.asks_base else len(self.validation.nonmembers),
            },
            "yardstick": self.yardstick,
            "influence": None if self.influence is None else self.influence.describe(),
        }


@dataclass(frozen=True)
class EncodedSets:
    """The rows of a run as tokens: what many runs on the same rows have in common."""

    policy: TextPolicy
    text: Mapping[str, Any]
    """How rows became tokens."""
    forget: Sequence[Example]
    retain: Sequence[Example] | None
    """None where there is no retain set."""
    rows: tuple[Sequence[Row], Sequence[Row]]
    """Forget and retain rows before they were tokens."""
    members: Sequence[Example]
    """The forget set's documents; empty where nothing is compared with them."""
    nonmembers: Sequence[Example]
    counterfactuals: Sequence[Sequence[Example]]
    """Two versions of the documents (`exchanged`); empty where other text says how far to go, and where
    the method is not told by tokens."""
    influence: RowsAtRisk | None = None
    """None without --influence."""

    @property
    def sample(self) -> tuple[Sequence[Row], Sequence[Row]]:
        """Forget and retain rows that `--chat-template auto` reads."""
        return evenly(self.rows[0]), evenly(self.rows[1])


def prepare(
    method: Method,
    options: TrainingOptions,
    config: PretrainedConfig,
    layout: DecoderLayout,
    tokenizer: PreTrainedTokenizerBase,
    forget: Iterable[Row | Mapping[str, object]],
    retain: Iterable[Row | Mapping[str, object]] | None,
    nonmembers: Iterable[Row | Mapping[str, object]] | None,
    policies: Sequence[TextPolicy] | None = None,
    *,
    has_base: bool = False,
) -> Prepared:
    """Checks rows and settings against each other and the model. Raises InputError.

    `policies` are the forms that rows may be asked in; None: those that the options leave open.
    `has_base`: whether there is the model from before the fine-tune, to be trained or asked.
    """
    method.check(layout)
    forget_rows = as_rows(forget, "forget")
    retain_rows = None if retain is None else as_rows(retain, "retain")
    nonmember_rows = None if nonmembers is None else as_rows(nonmembers, "nonmembers")
    _check_retain(method, retain_rows)
    if policies is None:
        policy = TextPolicy(
            context_of(config), long_rows=options.long_rows, vocabulary=vocabulary_of(config)
        )
        policies = policies_of(policy, options.chat_template, tokenizer)
    if isinstance(method, Retrain) and len(policies) > 1:
        raise InputError(
            "--chat-template auto: retraining asks no target that could tell; give on or off, as"
            " rows are to be learned"
        )
    *others, prepared = (
        prepare_encoded(
            method,
            options,
            config,
            layout,
            tokenizer,
            encode_sets(
                method,
                options,
                each,
                tokenizer,
                forget_rows,
                retain_rows,
                nonmember_rows,
                has_base=has_base,
            ),
            has_base=has_base,
        )
        for each in policies
    )
    return replace(prepared, plain=others[0]) if others else prepared


def encode_sets(
    method: Method,
    options: TrainingOptions,
    policy: TextPolicy,
    tokenizer: PreTrainedTokenizerBase,
    forget: RowSet,
    retain: RowSet | None,
    nonmembers: RowSet | None,
    *,
    has_base: bool = False,
) -> EncodedSets:
    """Tokenises every row once. Raises InputError for sets that overlap and rows that do not fit."""
    for other in (retain, nonmembers):
        if other is not None:
            check_disjoint(forget, other)
    influence = None
    if options.influence is not None:
        influence = read_influence(Path(options.influence))
        nothing = RowSet((), "", {})
        check_same_rows(options.influence, influence, forget, retain or nothing)
    versions: Sequence[Sequence[Row]] = ()
    if not (nonmembers or has_base or method.matches_tokens is None):
        versions = exchanged(documents(forget), documents(retain or ()), options.seed)
    windowed = replace(policy, long_rows="window")  # other words may be more tokens
    return EncodedSets(
        policy=policy,
        text=policy.describe(tokenizer),
        forget=encode_rows(forget, tokenizer, policy, eos=False),
        retain=None if retain is None else encode_rows(retain, tokenizer, policy, eos=True),
        rows=(forget.rows, () if retain is None else retain.rows),
        members=encode_rows(documents(forget), tokenizer, policy, eos=False)
        if nonmembers or versions
        else (),
        nonmembers=encode_rows(documents(nonmembers), tokenizer, policy, eos=False)
        if nonmembers
        else (),
        counterfactuals=[encode_rows(rows, tokenizer, windowed, eos=False) for rows in versions],
        influence=influence,
    )


def prepare_encoded(
    method: Method,
    options: TrainingOptions,
    config: PretrainedConfig,
    layout: DecoderLayout,
    tokenizer: PreTrainedTokenizerBase,
    sets: EncodedSets,
    *,
    has_base: bool = False,
) -> Prepared:
    """A run of these settings on rows that are tokens already. Raises InputError."""
    method.check(layout)
    retrains = isinstance(method, Retrain)
    if retrains and not has_base:
        raise InputError(
            "--method retrain: trains the model from before the fine-tune, and none was given; use"
            " expunge run --base BASE, or choose another method"
        )
    if method.whole_steps and options.micro_batch_size is not None:
        raise InputError(
            f"--micro-batch-size {options.micro_batch_size}: --method {method.name} needs all rows of a"
            " step in one pass; leave it out, and lower --batch-size where memory is short"
        )
    if retrains and sets.influence is not None:
        raise InputError("--influence: --method retrain takes all retain rows alike; leave it out")
    warnings = _check_retain(method, sets.retain)
    if sets.retain is None and options.retain_sampling == "influence":
        raise InputError("--retain-sampling influence: needs a retain set; give --retain")
    policy = sets.policy
    retain_examples = sets.retain or ()
    windowed = count_windowed(sets.forget) + count_windowed(retain_examples)
    if windowed:
        warnings.append(
            f"{windowed} rows are longer than the context of {policy.context} and were windowed"
        )
    # An oracle has seen every row that is to stay.
    fraction = options.validation_fraction
    fraction = 0.0 if retrains and fraction is None else fraction
    kept_out, trained_on = _split(retain_examples, fraction, options.seed)
    # Beside a retain set only: alone they would hide that nothing holds what must stay.
    held = random_examples(
        method.random_rows if trained_on else 0,
        tokenizer,
        vocabulary_of(config),
        policy.context,
        options.seed,
        # The target goes on behind as many.
        2 * LENGTH if method.sampling.written_ratio else LENGTH,
    )
    forgotten: Sequence[Example] = sets.forget
    kept: Sequence[Example] = trained_on
    facts = None
    if sets.influence is not None:
        forgotten, kept, facts = applied(sets.influence, options, sets.forget, trained_on)
        warnings += [facts.said] if facts.skipped else []
    if retrains:
        forgotten, kept = kept, ()
    asks_base = has_base and not retrains and not sets.nonmembers
    generator = torch.Generator().manual_seed(options.seed)
    validation = ValidationSet(
        _sample(sets.forget, generator),
        _validation_retain(kept_out, trained_on, generator),
        sets.forget if asks_base else sets.members,
        drawn_nonmembers(sets.nonmembers, sets.members, generator),
        method.matches_tokens,
    )
    return Prepared(
        method=method,
        options=options,
        used=resolved(method, options, layout, len(forgotten)),
        policy=policy,
        text=sets.text,
        sample=sets.sample,
        forget=forgotten,
        retain=[*kept, *held],
        validation=validation,
        retain_kept_out=bool(kept_out),
        pad_id=PAD_ID,
        warnings=warnings,
        influence=facts,
        has_template=bool(tokenizer.chat_template),
        asks_base=asks_base,
        counterfactuals=sets.counterfactuals,
        preferred=encode_beside(
            forgotten, method.preferred(*sets.rows, options.seed), tokenizer, policy
        ),
    )


def _check_retain(method: Method, retain: object | None) -> list[str]:
    """Raises InputError where a retain set is missing; returns warnings."""
    if retain is None and method.needs_retain:
        raise InputError(
            f"--method {method.name}: needs a retain set; give --retain with rows of the forget set's"
            " kind that must stay, or choose gradient-ascent"
        )
    if retain is None:
        return [
            "no retain set: nothing holds what must stay, and a destroyed model cannot be noticed."
            " Give --retain with rows like the forget set's that are to stay"
        ]
    return []


def _split(
    examples: Sequence[Example], fraction: float | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """Whole rows kept out of training, no more than are looked at, and the rest.

    At least one row stays on each side.
    """
    ids = sorted({example.row_id for example in examples})
    if fraction is None:
        fraction = _KEPT_OUT if _KEPT_OUT * len(ids) >= _FEWEST_KEPT_OUT else 0.0
    count = min(round(fraction * len(ids)), len(ids) - 1, _VALIDATION_ROWS // 2)
    if fraction > 0 and len(ids) > 1:
        count = max(1, count)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {ids[index] for index in order[: max(0, count)]}
    return (
        [example for example in examples if example.row_id in chosen],
        [example for example in examples if example.row_id not in chosen],
    )


def _validation_retain(
    kept_out: Sequence[Example], trained_on: Sequence[Example], generator: torch.Generator
) -> list[Example]:
    """Kept-out rows first, at most half; the rest are trained on, which most of the set is."""
    unseen = _sample(kept_out, generator)[: _VALIDATION_ROWS // 2]
    return unseen + _sample(trained_on, generator)[: _VALIDATION_ROWS - len(unseen)]


def _sample(examples: Sequence[Example], generator: torch.Generator) -> list[Example]:
    """Up to 64 examples with an answer, evenly drawn."""
    answered = [example for example in examples if any(example.answer_mask[1:])]
    order = torch.randperm(len(answered), generator=generator).tolist()
    return [answered[index] for index in sorted(order[:_VALIDATION_ROWS])]
