"""Influence of rows, from files to a report: checks, loads the model, predicts, lists overlaps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import expunge
from expunge.analysis.influence_file import (
    ForgetRow,
    Influence,
    RetainRow,
    influence_text,
    is_gone,
    is_influence,
    thresholds_of,
)
from expunge.analysis.leave_out import CurvatureKind, leave_out
from expunge.analysis.overlap import overlaps
from expunge.analysis.row_gradients import RowGradients, Windows, block_shape, linear_maps, rows_of
from expunge.analysis.template_choice import settled
from expunge.data.batches import PAD_ID
from expunge.data.chat_templates import Template, template_of
from expunge.data.fingerprints import data_fingerprint, named
from expunge.data.rows import Reading, RowSet, check_disjoint
from expunge.data.tokenization import LongRows, encode_rows
from expunge.disk import check_file_output, deliver
from expunge.errors import InputError
from expunge.maths.curvature import DampingUnit
from expunge.models.decoder import DecoderLayout
from expunge.models.devices import resolve_device
from expunge.models.loading import RunDtype, check_model, load_model, resolve_dtype, said_of_dtype
from expunge.models.text_forms import text_policies
from expunge.processes import check_alone

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class InfluenceInputs(Reading):
    """What is analysed, how, and where the result goes."""

    model: str
    """The target model: a directory, or a hub id."""
    forget: str
    """Rows that are to be removed."""
    retain: str | None = None
    """Rows that are to stay; without them there is no collateral and no overlap."""
    nonmembers: str | None = None
    """Non-members. Their loss is the one from which a forget row counts as gone."""
    output: str | None = None
    """Write influence.json here: ids and numbers, never text."""
    curvature: CurvatureKind = "diagonal"
    """The Fisher's diagonal; EK-FAC (arXiv 2308.03296); or cg: EK-FAC for self-influence, the whole
    Gauss-Newton matrix by conjugate gradients for collateral."""
    damping: float = 1.0
    """lambda, what is added to the curvature before it is inverted."""
    damping_unit: DampingUnit = "mean-fisher"
    """Unit of the damping: the mean of the curvature's eigenvalues, or 1."""
    layers: str | None = None
    """Decoder layers whose linear maps count, such as 8-15, from 0; null: all."""
    batch_size: int = 8
    """Rows a batch; it changes speed and memory, never a number."""
    dtype: RunDtype = "auto"
    """Dtype that the model is loaded and run in; auto: the one of its files, for float16 files float32.
    Sums are in float32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    chat_template: Template = "auto"
    """Render rows with the chat template. auto: if the target answers sampled rows better with
    it."""
    long_rows: LongRows = "refuse"
    """Refuse rows longer than the context, or cut them into windows."""
    trust_remote_code: bool = False
    """Run code that the model's directory brings along."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be 1 or more")
        if not 0 < self.damping < float("inf"):
            raise InputError(f"--damping {self.damping}: must be positive")
        object.__setattr__(self, "chat_template", template_of(self.chat_template))


def analyze_influence(
    inputs: InfluenceInputs,
    progress: Report = lambda _name, _done, _total: None,
    message: Callable[[str], None] = lambda _: None,
) -> tuple[Influence, dict[str, RowSet]]:
    """Checks every input, loads the model, predicts, and writes influence.json if it was asked for.

    Returns the rows too, for those who may see them. Raises InputError before a model is loaded and
    anything is written, RunError where a prediction is not finite.
    """
    device = resolve_device(inputs.device)
    check_alone("analyze influence")
    if inputs.output is not None:
        read = {name: getattr(inputs, name) for name in ("model", "forget", "retain", "nonmembers")}
        check_file_output("output", Path(inputs.output), read, is_influence)
    checked = check_model(inputs.model, trust_remote_code=inputs.trust_remote_code)
    first, last = layer_range(inputs.layers, checked.layout)
    sets = inputs.read_sets("forget", "retain", "nonmembers")
    for name in (name for name in sets if name != "forget"):
        check_disjoint(sets["forget"], sets[name])
    fingerprints = {name: data_fingerprint(rows) for name, rows in sets.items()}
    policies = text_policies(checked, inputs.chat_template, inputs.long_rows)
    forms: list[dict[str, list[Windows]]] = [
        {
            # Retained text was trained with its end, forgotten text is counted without, as in a run.
            name: rows_of(encode_rows(found, checked.tokenizer, policy, eos=name == "retain"))
            for name, found in sets.items()
        }
        for policy in policies
    ]
    dtype = resolve_dtype(checked, inputs.dtype)
    if inputs.curvature == "cg" and dtype != "float32":
        raise InputError(f"--curvature cg: its products are too rough in {dtype}; give --dtype float32")
    for line in said_of_dtype(checked, inputs.dtype, device):
        message(line)
    model = load_model(checked, dtype, device)
    policy = settled(
        policies, lambda: model, checked.tokenizer, sets["forget"], sets.get("retain"), message
    )
    rows = forms[policy.chat_template and len(forms) - 1]
    maps = linear_maps(model, checked.layout, first, last)
    passes = RowGradients(model, maps, PAD_ID, inputs.batch_size)
    forget, retain = rows["forget"], rows.get("retain", [])
    found = leave_out(
        passes, forget, retain, inputs.curvature, inputs.damping, inputs.damping_unit, progress
    )
    if found.residuals:
        message(
            f"conjugate gradients: {len(found.residuals) - 1} iterations, residual"
            f" {found.residuals[-1]:.2g} of the gradient"
        )
    unseen = passes.run(rows["nonmembers"]) if "nonmembers" in rows else []
    kinds = [row.kind for row in sets.get("nonmembers", ())]
    vocabulary = model.config.get_text_config().vocab_size
    thresholds = thresholds_of(list(zip(kinds, unseen, strict=True)), vocabulary)
    influence = Influence(
        model=named(inputs.model),
        model_sha256=checked.files.sha256(),
        data_hmac_sha256=fingerprints,
        settings={
            "layers": [first, last],
            **{name: getattr(inputs, name) for name in ("curvature", "damping", "damping_unit")},
            "long_rows": inputs.long_rows,
            "dtype": dtype,
            "chat_template": policy.chat_template,
        },
        curvature={
            "maps": len(maps),
            "parameters": sum(math.prod(block_shape(module)) for module in maps.values()),
            "tokens": found.tokens,
            "mean_fisher": found.mean_fisher,
            "damping": found.damping,
            "residuals": list(found.residuals),
        },
        thresholds=thresholds,
        forget=[
            ForgetRow(
                *(row.id, row.task, row.kind),
                **vars(known),
                self_influence=value,
                gone=is_gone(known, thresholds[row.kind]),
            )
            for row, known, value in zip(sets["forget"], found.forget, found.self_influence, strict=True)
        ],
        retain=[
            RetainRow(*(row.id, row.task, row.kind), **vars(known), collateral=value)
            for row, known, value in zip(
                sets.get("retain", ()), found.retain, found.collateral, strict=True
            )
        ],
        overlaps=overlaps(list(sets["forget"]), list(sets.get("retain", ()))),
        expunge=expunge.__version__,
    )
    if inputs.output is not None:
        deliver({Path(inputs.output): influence_text(influence)})
    return influence, sets


def layer_range(layers: str | None, layout: DecoderLayout) -> tuple[int, int]:
    """First and last layer of `a-b` or `a`. Raises InputError."""
    if layers is None:
        return 0, layout.count - 1
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", layers.strip())
    if match is None:
        raise InputError(f"--layers {layers}: is no range; write for example 8-15")
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if not first <= last < layout.count:
        raise InputError(
            f"--layers {layers}: the model has the layers 0 to {layout.count - 1}; the first must not"
            " be above the last"
        )
    return first, last
