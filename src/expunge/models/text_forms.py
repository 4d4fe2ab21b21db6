"""The forms that a model may be asked in: context, vocabulary, chat template."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from expunge.data.chat_templates import Template
from expunge.data.tokenization import LongRows, TextPolicy
from expunge.errors import InputError
from expunge.models.files import MANIFEST, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from expunge.models.loading import CheckedModel

_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length")


def text_policy(checked: CheckedModel, *, chat_template: bool, long_rows: LongRows) -> TextPolicy:
    """The policy of a run on this model."""
    return TextPolicy(checked.context, chat_template, long_rows, vocabulary_of(checked.config))


def text_policies(checked: CheckedModel, template: Template, long_rows: LongRows) -> list[TextPolicy]:
    """The forms that rows may be asked in: one, or two of which the weights decide (`policies_of`).

    `auto` takes what the expunge.json beside the model records. Raises InputError.
    """
    policy = text_policy(checked, chat_template=False, long_rows=long_rows)
    recorded = recorded_template(checked) if template == "auto" else None
    if recorded or (recorded is False and checked.tokenizer.chat_template):
        return [replace(policy, chat_template=recorded, template_choice={"by": MANIFEST})]
    return policies_of(policy, template, checked.tokenizer)


def policies_of(
    policy: TextPolicy, template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[TextPolicy]:
    """The policy without and with the chat template, as far as that is open; the longer rows last."""
    chat = replace(policy, chat_template=True)
    if template == "auto" and tokenizer.chat_template:
        return [policy, chat]
    return [chat if template == "on" else policy]


def recorded_template(checked: CheckedModel) -> bool | None:
    """Whether the run that made the model used the chat template; None where no run made it."""
    adapter = checked.files.adapter
    path = (adapter[0].parent if adapter else checked.files.directory) / MANIFEST
    found: Any = read_json(path) if path.is_file() else {}
    for name in ("settings", "training", "text", "chat_template"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, bool) else None


def context_of(config: PretrainedConfig) -> int:
    """Longest sequence in tokens that the configuration states, under whichever name.

    Those of transformers that know none of the names have no positions (Mamba), or biases by distance
    (BLOOM), and so no limit. Raises InputError where a name is there without a number, and for a model's
    own code, of which nothing is known.
    """
    text = config.get_text_config(decoder=True)
    stated = [getattr(text, name) for name in _CONTEXT_NAMES if hasattr(text, name)]
    lengths = [value for value in stated if type(value) is int and value > 0]
    if not lengths and (stated or not type(text).__module__.startswith("transformers.")):
        raise InputError(
            f"{config.model_type}: its config.json states no context; write the tokens that the model"
            f" was trained for to {_CONTEXT_NAMES[0]} there"
        )
    return lengths[0] if lengths else sys.maxsize


def vocabulary_of(config: PretrainedConfig) -> int:
    """Number of token ids that the model has embeddings for."""
    return int(config.get_text_config().vocab_size)
