"""`expunge plan`: what a run would take, before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from expunge.audits.inputs import planned, read_sets, requests_of
from expunge.cli.inputs import audit_of
from expunge.cli.options import Printed, print_json
from expunge.cli.run import parsed
from expunge.errors import InputError
from expunge.models.devices import resolve_device
from expunge.models.loading import resolve_dtype, said_of_dtype
from expunge.models.text_forms import text_policies
from expunge.runs.memory_parts import Phase
from expunge.runs.planning import (
    GIB,
    GPUS,
    Budget,
    Plan,
    alternatives,
    budget_of,
    plan,
    retraining,
)
from expunge.runs.run import RunInputs, check_run
from expunge.training.options import TrainingOptions

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.audits.memory import PlannedAudit
    from expunge.models.loading import CheckedModel

_ABOUT = f"""
expunge plan MODEL --forget F --retain R [--on GPU] [--method M] [--audit]

Takes the options of `expunge run` and prints what that run would take: memory by part and phase, disk,
steps, and whether it fits. No weights are read and nothing is written. GPUs that --on knows:
{", ".join(GPUS)}.

Examples:
  expunge plan model --forget forget.jsonl --retain retain.jsonl
  expunge plan model --forget f.csv --retain r.csv --on h100-80 --audit
  expunge plan model --forget f.csv --retain r.csv --on 24GB --method libu
"""


@dataclass(frozen=True)
class PlanInputs(Printed, RunInputs):
    """Those of a run; it need not say where the result goes."""

    output: str = ""
    """The run directory that would be written. If given, it is checked as `run` checks it."""
    on: str | None = None
    """Plan for this GPU, or for so much memory such as 24GB; null: this machine."""
    sharded: int = 1
    """Plan for each of so many processes that share the weights (FSDP2)."""
    audit: bool = False
    """Plan an audit of the result too, at its default budget."""

    def __post_init__(self) -> None:
        if self.sharded < 1:
            raise InputError(f"--sharded {self.sharded}: give a number of processes, such as 8")


def main(arguments: Sequence[str]) -> int:
    """Parses, checks, computes, prints."""
    settings, _ = parsed(arguments, "expunge plan", PlanInputs, _ABOUT)
    inputs, training = settings.inputs, settings.training
    on, device = inputs.on, inputs.device
    # A GPU that is planned for need not be in this machine.
    budget = budget_of(on, device, "cpu" if on is not None else resolve_device(device))
    checked, _, prepared = check_run(inputs, settings.settings, training, writes=bool(inputs.output))
    if on is None:
        told = said_of_dtype(checked, inputs.dtype, budget.device_type)
        prepared = replace(prepared, warnings=[*prepared.warnings, *told])
    changed = prepared.changed(checked)
    given = changed, prepared, resolve_dtype(changed, inputs.dtype), budget, inputs.sharded
    found, exact = plan(*given), retraining(*given)
    others = iter(()) if found.fits else alternatives(*given)
    audit = _audit(inputs, training, checked, budget) if inputs.audit else None
    if inputs.json:
        print_json(_json(found, others, exact, audit))
    else:
        show(found, others, exact)
        if audit is not None:
            _print_audit(audit, budget)
    return 0


def _audit(
    inputs: PlanInputs, training: TrainingOptions, checked: CheckedModel, budget: Budget
) -> PlannedAudit:
    """What an audit of the result takes: its tensors are as large as the target's."""
    if inputs.retain is None:
        raise InputError("--audit: attacks compare with rows that were to stay; give --retain")
    given = audit_of(inputs, training)
    policies = text_policies(checked, given.chat_template, given.long_rows)
    requests = requests_of(given, read_sets(given, {}), {"target": checked}, policies)
    dtype = resolve_dtype(checked, given.dtype)
    return planned(given, requests, checked, policies[-1], dtype, budget.device_type, budget.bytes)


def _json(
    found: Plan, others: Iterable[tuple[str, Plan]], exact: Plan | None, audit: PlannedAudit | None
) -> dict[str, Any]:
    audited = {}
    if audit is not None:
        phases = {phase.name: dict(phase.parts) for phase in audit.phases}
        audited = {
            "tuning": audit.tuned,
            "phases": phases,
            "peak_bytes": audit.peak,
            "fits": audit.fits,
        }
    return found.to_json() | {
        **({"audit": audited} if audited else {}),
        "retraining": None if exact is None else exact.to_json(),
        "alternatives": [
            {"options": options, "peak_bytes": other.peak.bytes, "fits": other.fits}
            for options, other in others
        ],
    }


def outcome(found: Plan) -> str:
    """Its peak, and whether that fits."""
    verdict = "fits" if found.fits else "does not fit"
    return (
        f"{_gib(found.peak.bytes)} in the phase {found.peak.name!r}: {verdict} {found.budget.name}"
        f" ({_gib(found.budget.bytes)})"
    )


def show(found: Plan, others: Iterable[tuple[str, Plan]] = (), exact: Plan | None = None) -> None:
    """Prints a plan, what would take less, and beside it what retraining takes."""
    from expunge.reporting.tables import table_console

    console = table_console()
    place = "GPU memory" if found.budget.device_type == "cuda" else "memory"
    accelerator = any(phase.cpu_parts for phase in found.phases)
    if accelerator:
        console.print(_table([p for p in found.phases if p.parts], f"{place} by part, MiB (computed)"))
        cpu = [Phase(p.name, p.cpu_parts, {}) for p in found.phases]
        console.print(_table(cpu, "CPU memory by part, MiB (computed)"))
    else:
        console.print(_table(found.phases, f"{place} by part, MiB (computed)"))
    for name, value in _facts(found):
        console.print(f"{name + ':':<11}{value}", soft_wrap=True)
    console.print(f"{'peak:':<11}{outcome(found)}", soft_wrap=True)
    for options, other in others:
        told = "fits" if other.fits else "does not fit either"
        console.print(f"  with {options}: {_gib(other.peak.bytes)}, {told}", soft_wrap=True)
    for each in [] if exact is None else [found, exact]:
        told = "fits" if each.fits else "does not fit"
        console.print(
            f"{each.method + ':':<11}{each.epochs:g} passes over {each.rows['forget']} rows,"
            f" {each.steps} steps, {each.steps * each.step_tokens:,.0f} tokens,"
            f" {_gib(each.peak.bytes)}, {told}",
            soft_wrap=True,
        )
    if exact is not None:
        console.print("If you can retrain, do: the result never saw the rows (--method retrain).")


def _print_audit(audit: PlannedAudit, budget: Budget) -> None:
    from expunge.reporting.tables import table_console

    console = table_console()
    console.print(_table(audit.phases, "an audit, one model at a time, MiB (computed)"))
    tuned = {"full": "every weight", "lora": "an adapter, as every weight does not fit"}[audit.tuned]
    console.print(f"{'tunes:':<11}{tuned}", soft_wrap=True)
    verdict = "fits" if audit.fits else f"does not fit; {audit.mend}"
    console.print(
        f"{'peak:':<11}{_gib(audit.peak)} in an audit: {verdict} ({_gib(budget.bytes)})",
        soft_wrap=True,
    )


def _facts(found: Plan) -> list[tuple[str, str]]:
    """What a line each says below the table."""
    engine = {
        "segment": "the trained layers alone, on cached states of the layers below",
        "hooks": "the whole model up to the steered layer, in every step",
        "whole model": "the whole model, in every step",
    }[found.path]
    why = f" ({found.why_whole})" if found.why_whole else ""
    limit = f", or --time-limit {found.time_limit}" if found.time_limit else ""
    recomputed = f"; {found.rows_recomputed} rows do not fit" if found.rows_recomputed else ""
    facts = [
        ("runs", engine + why),
        (
            "rows",
            f"{found.rows['forget']} forget, {found.rows['retain']} retain;"
            f" {found.measured_rows} measured with each candidate",
        ),
        (
            "tokens",
            f"{found.tokens['forget']} forget, {found.tokens['retain']} retain in one pass over each",
        ),
        (
            "steps",
            f"{found.steps}{limit}; {found.steps_per_epoch} an epoch,"
            f" {found.batch_size} rows a step and side",
        ),
        (
            "disk",
            f"{_mib(found.output_bytes)} MiB for the output; beside it until the run ends"
            f" {_mib(found.cache_bytes)} MiB of cached states ({found.cache_rows} rows{recomputed})"
            f" and {_mib(2 * found.state_bytes)} MiB of saved states",
        ),
    ]
    return facts + [("warning", warning) for warning in found.warnings]


def _table(phases: Sequence[Phase], title: str) -> Table:
    from rich import box
    from rich.table import Table

    largest = max(phases, key=lambda phase: phase.bytes)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("part")
    for phase in phases:
        table.add_column(phase.name + " *" * (phase is largest), justify="right", no_wrap=True)
    names = dict.fromkeys(name for phase in phases for name in phase.parts)
    for name in names:
        sizes = [phase.parts.get(name, 0) for phase in phases]
        if max(sizes) >= 2**19:
            table.add_row(name, *(_mib(size) if size else "-" for size in sizes))
    table.add_section()
    table.add_row("together", *(_mib(phase.bytes) for phase in phases))
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
