"""Training of the benchmark's tokenizer and of small OLMo models that memorise its texts.

The matrices of the layers are trained by Muon, the tied embeddings by AdamW: on these texts that
memorises in a quarter of the steps of AdamW alone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedTokenizerFast

from expunge.benchmark.recipe import PretrainingSettings, Progress, TrainingText
from expunge.models.kernels import fast_products, quick_dtype

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
_END_ID = 0
_PADDING_ID = 1
_IGNORED = -100
_SETTING_UP = threading.Lock()
"""A tokenizer serves one thread at a time, and new weights are drawn from torch's one generator."""


@dataclass(frozen=True)
class TrainingResult:
    """How a training went; loss and accuracy are those of the trained model in float32."""

    seconds: float
    steps: int
    tokens: int
    """Tokens of one pass over the texts."""
    loss: float
    """Mean loss of a continuation's token."""
    accuracy: float
    """Share of the continuations' tokens, ends included, that the model ranks first."""


@dataclass(frozen=True)
class _Example:
    ids: Tensor
    start: int
    """Position of the first token of the continuation."""


@dataclass(frozen=True)
class _Batch:
    ids: Tensor
    """Token ids, padded on the right: [rows, positions]."""
    labels: Tensor
    """The next token at each position, _IGNORED at the end and in the padding."""
    continuation: Tensor
    """Whether the label belongs to the continuation."""


def train_tokenizer(texts: Sequence[str], settings: PretrainingSettings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an end-of-text and a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def train_model(
    texts: Sequence[TrainingText],
    tokenizer: PreTrainedTokenizerFast,
    settings: PretrainingSettings,
    progress: Progress = lambda stage, done, total: None,
    stage: str = "training",
) -> tuple[OlmoForCausalLM, TrainingResult]:
    """Train a new model on the texts; the same call on the same machine gives the same weights.

    Computes with one thread. Several calls may run at once, each in a Python thread of its own.
    """
    torch.set_num_threads(1)
    with _SETTING_UP:
        examples = [_encode(text, tokenizer, settings.context) for text in texts]
        model = _new_model(len(tokenizer), settings)
    generator = torch.Generator().manual_seed(settings.seed)
    plan = [
        batch
        for _ in range(settings.epochs)
        for batch in _epoch(examples, settings.batch_tokens, generator)
    ]
    optimizers = _optimizers(model, settings)
    in_bfloat16 = quick_dtype("cpu") == "bfloat16"
    started = time.perf_counter()
    model.train()
    for step, indices in enumerate(plan):
        progress(stage, step, len(plan))
        rate = _rate(step, len(plan), settings.warmup_steps)
        batch = _collate([examples[index] for index in indices])
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16),
            fast_products(torch.float32, torch.device("cpu")),
        ):
            logits = model(input_ids=batch.ids, use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=_IGNORED)
        torch.autograd.backward(loss)
        clip_grad_norm_(model.parameters(), settings.gradient_norm)
        for optimizer, highest in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = highest * rate
            with fast_products(torch.bfloat16, torch.device("cpu")):  # Muon's own are bfloat16
                optimizer.step()
            optimizer.zero_grad()
    model.eval()
    mean_loss, accuracy = _measure(model, examples, settings.batch_tokens)
    progress(stage, len(plan), len(plan))
    seconds = time.perf_counter() - started
    tokens = sum(len(example.ids) for example in examples)
    result = TrainingResult(seconds, len(plan), tokens, mean_loss, accuracy)
    logger.info("%s: %s", stage, result)
    return model, result


def _encode(text: TrainingText, tokenizer: PreTrainedTokenizerFast, context: int) -> _Example:
    # The tokens of the prompt begin those of the text: no token spans the space between the two.
    ids = [*tokenizer(text.text)["input_ids"], _END_ID]
    if len(ids) > context:
        raise ValueError(f"a text has {len(ids)} tokens: raise context ({context})")
    return _Example(torch.tensor(ids), len(tokenizer(text.prompt)["input_ids"]))


def _new_model(vocabulary: int, settings: PretrainingSettings) -> OlmoForCausalLM:
    config = OlmoConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_END_ID,
        pad_token_id=_PADDING_ID,
        # Faster than the fused kernel at these lengths on a CPU.
        attn_implementation="eager",
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = OlmoForCausalLM(config)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=settings.embedding_deviation)
    return model


def _optimizers(
    model: OlmoForCausalLM, settings: PretrainingSettings
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each optimizer with its highest learning rate; OLMo's norms have no parameters."""
    embeddings = model.get_input_embeddings().weight
    matrices = [parameter for parameter in model.parameters() if parameter is not embeddings]
    return [
        (
            torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=0.0),
            settings.muon_learning_rate,
        ),
        (
            torch.optim.AdamW(
                [embeddings],
                lr=settings.embedding_learning_rate,
                betas=(0.9, 0.95),
                weight_decay=0.0,
                fused=True,
            ),
            settings.embedding_learning_rate,
        ),
    ]


def _rate(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of a step as a share of the highest one."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def _epoch(
    examples: Sequence[_Example], batch_tokens: int, generator: torch.Generator
) -> list[list[int]]:
    """Batches of indices, each of examples of similar length, in random order."""
    order: list[int] = torch.randperm(len(examples), generator=generator).tolist()
    order.sort(key=lambda index: len(examples[index].ids))
    batches: list[list[int]] = [[]]
    for index in order:
        # Examples come in the order of their lengths, so this one is the longest of its batch.
        if len(examples[index].ids) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    shuffled: list[int] = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[index] for index in shuffled]


def _collate(examples: Sequence[_Example]) -> _Batch:
    shape = (len(examples), max(len(example.ids) for example in examples))
    ids = torch.full(shape, _PADDING_ID)
    labels = torch.full(shape, _IGNORED)
    continuation = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = example.ids
        labels[row, : length - 1] = example.ids[1:]
        continuation[row, example.start - 1 : length - 1] = True
    return _Batch(ids, labels, continuation)


@torch.inference_mode()
def _measure(
    model: OlmoForCausalLM, examples: Sequence[_Example], batch_tokens: int
) -> tuple[float, float]:
    """Mean loss and accuracy over the tokens of the continuations, given all tokens before them."""
    loss, right, tokens = 0.0, 0, 0
    for indices in _epoch(examples, batch_tokens, torch.Generator().manual_seed(0)):
        batch = _collate([examples[index] for index in indices])
        logits = model(input_ids=batch.ids, use_cache=False).logits[batch.continuation]
        labels = batch.labels[batch.continuation]
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        tokens += len(labels)
    return loss / tokens, right / tokens
