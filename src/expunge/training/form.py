"""In which form rows are asked, and whether the target knows them there: settled before training."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from expunge.analysis.template_choice import chosen, read_form, said_of
from expunge.errors import RefusedRun
from expunge.models.decoder import DecoderLayout
from expunge.models.parts import Parts
from expunge.processes import OneProcess, Processes
from expunge.segments.engine import Autocast, read_in_turn
from expunge.training.preparation import Prepared
from expunge.training.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolved_form(
    prepared: Prepared,
    layout: DecoderLayout,
    parts: Parts,
    tokenizer: PreTrainedTokenizerBase,
    autocast: Autocast,
    progress: Progress,
    processes: Processes | None = None,
) -> Prepared:
    """The run with its chat template on or off, where that was left open; otherwise as it is.

    A run that measures nothing later (`--select last`) has its sample read as well. Raises RefusedRun
    where the target knows none of it then. Several processes go on with what the main one found.
    """
    forms = [prepared] if prepared.plain is None else [prepared.plain, prepared]
    if len(forms) > 1 or prepared.looks:
        progress.phase("asking the target", 0, 1)
        with read_in_turn(parts, layout):
            mine = [
                read_form(parts.model, tokenizer, form.policy, *form.sample, parts.device, autocast)
                for form in forms
            ]
        progress.phase("asking the target", 1, 1)
        read = (processes or OneProcess()).gather(mine)[0]
        if len(forms) > 1:
            policy = chosen([form.policy for form in forms], read)
            prepared = dataclasses.replace(
                forms[policy.chat_template],
                policy=policy,
                text=policy.describe(tokenizer),
                plain=None,
                base=prepared.base,
            )
        if prepared.looks:
            answered = read[-1] if len(forms) == 1 else read[prepared.policy.chat_template]
            told = unknown(
                prepared,
                answered.forget_rows,
                answered.forget_known,
                answered.forget_accuracy,
                progress,
            )
            prepared = dataclasses.replace(prepared, warnings=[*prepared.warnings, *told])
    for line in said_of(prepared.policy):
        progress.message(line)
    return prepared


def unknown(
    prepared: Prepared, rows: int, known: float, accuracy: float, progress: Progress
) -> list[str]:
    """Says how many forget rows the target knows in the form given.

    `known` is the share of `rows` that it does. Less than half is a warning, which is returned: model or
    form may be the wrong one. Raises RefusedRun if it knows none, unless the options go on.
    """
    missing = rows - round(known * rows)
    told = (
        f"the target does not know {missing} of {rows} forget rows measured, in the form given"
        f" (forget accuracy {accuracy:.2f})"
    )
    if not missing:
        told = "the target knows every forget row measured, in the form given"
    if known >= 0.5:
        progress.message(told)
        return []
    told += f"; {_mend(prepared)}"
    if missing == rows and prepared.options.unknown_rows == "refuse":
        raise RefusedRun(f"--forget: {told}, or go on with --unknown-rows unlearn")
    return [told]


def _mend(prepared: Prepared) -> str:
    choice = prepared.policy.template_choice
    if prepared.has_template and (choice is None or "on" not in choice):
        return "it may know them in the other form: give --chat-template " + (
            "off" if prepared.policy.chat_template else "on"
        )
    return "give the model that was trained on them, and rows in the form of its training"
