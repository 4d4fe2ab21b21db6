"""The options of every command that asks saved models about rows."""

from __future__ import annotations

from dataclasses import dataclass

from expunge.data.chat_templates import Template, template_of
from expunge.data.rows import Reading
from expunge.data.tokenization import LongRows
from expunge.errors import InputError
from expunge.models.loading import AnyDtype


@dataclass(frozen=True, kw_only=True)
class Asking(Reading):
    """How rows are read, and how models are loaded and asked about them."""

    batch_size: int = 64
    """Rows a batch; it changes the speed, never a score."""
    dtype: AnyDtype = "auto"
    """Dtype that models run in. auto: the one that each is saved in, for float16 files float32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    chat_template: Template = "auto"
    """Render prompts with the chat template. auto: as the run recorded, or if sampled rows are
    answered better with it."""
    long_rows: LongRows = "refuse"
    """Refuse rows longer than the context, or cut them into windows."""
    trust_remote_code: bool = False
    """Run code that a model's directory brings along."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chat_template", template_of(self.chat_template))
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be 1 or more")
