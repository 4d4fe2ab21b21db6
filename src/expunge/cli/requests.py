"""`expunge requests`: erasure requests as they come in, are served, verified and shown for evidence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from expunge.cli.help import HELP
from expunge.cli.options import Printed, parse, print_json
from expunge.errors import InputError, near
from expunge.ledger.bundles import BundleInputs, Checked, check_bundle, export
from expunge.ledger.dates import today
from expunge.ledger.receiving import NewRequest, add, reopen, update, withdraw
from expunge.ledger.records import (
    Request,
    read_events,
    read_request,
    read_requests,
    read_rows_of,
    read_runs,
    read_verdicts,
)
from expunge.ledger.store import LedgerPlace, open_ledger

if TYPE_CHECKING:
    from rich.table import Table

_ABOUT = """usage: expunge requests SUBCOMMAND ... --ledger FILE

Keeps erasure requests in one file: which rows, received when and due when, the run that served
them, every verdict since. It holds ids and keyed hashes of rows, never their text.

{lines}

expunge requests SUBCOMMAND --help tells its options.
"""
_SERVE = (
    "expunge requests serve MODEL --ledger FILE --output OUT [--retain R] [--method M] [--resume]\n\n"
    "Serves all open requests with one run and takes the options of `expunge run`. The requests are"
    " marked served once the run is complete."
)
_VERIFY = (
    "expunge requests verify MODEL --ledger FILE --output DIR [--original TARGET] [--retain R]\n\n"
    "Audits every request that was served on the model as it is today, as `expunge audit` does, and"
    " records a verdict for each."
)


@dataclass(frozen=True)
class Add(Printed, NewRequest, LedgerPlace):
    """expunge requests add --ledger FILE --forget F [--retain R] [--subject REF] [--due 30d]

    Checks the rows and records them by id and keyed hash; a missing ledger is made. The rows stay
    where they are: keep the file until the request is served and verified.
    """


@dataclass(frozen=True)
class List(Printed, LedgerPlace):
    """expunge requests list --ledger FILE

    Prints every request with its state. Overdue: its last day has passed and it is open or failed.
    """


@dataclass(frozen=True, kw_only=True)
class Numbered(LedgerPlace):
    """One request of a ledger."""

    id: int
    """The request's number."""


@dataclass(frozen=True)
class Show(Printed, Numbered):
    """expunge requests show ID --ledger FILE

    Prints a request's record: its history, the ids of its rows, the runs that served it, every verdict.
    """


@dataclass(frozen=True)
class Update(Numbered):
    """expunge requests update ID --ledger FILE [--forget F] [--retain R] [--due 30d]

    Records that the forget file moved or was written anew (with the same rows), another retain set,
    or another last day.
    """

    forget: str | None = None
    """Where the request's rows are now."""
    retain: str | None = None
    """Rows to keep, in place of those recorded."""
    due: str | None = None
    """Last day in time: a date, or days after it was received such as 30d."""


@dataclass(frozen=True)
class Withdraw(Numbered):
    """expunge requests withdraw ID --ledger FILE

    Records that an open or failed request is no longer to be served.
    """


@dataclass(frozen=True)
class Reopen(Numbered):
    """expunge requests reopen ID --ledger FILE

    Has the next run serve a request again, for example one whose verification failed.
    """


@dataclass(frozen=True)
class Export(BundleInputs, Numbered):
    """expunge requests export ID --ledger FILE --output BUNDLE.zip [--key private.pem]

    Writes the evidence of one request: its record, the run's manifest, scores and report, its last
    audit, and the SHA-256 of each file. With --key it is signed (Ed25519).
    """


@dataclass(frozen=True)
class VerifyBundle(Printed):
    """expunge requests verify-bundle BUNDLE.zip [--public-key public.pem]

    Checks that every file of a bundle is what was signed, and that record, manifest and audit
    belong together. Exit code 1 if one is not.
    """

    bundle: str
    """The bundle."""
    public_key: str | None = None
    """The signer's Ed25519 public key (PEM); without it only the bundle's own is checked."""


def main(arguments: Sequence[str]) -> int:
    """Finds the subcommand."""
    arguments = list(arguments)
    if not arguments or arguments[0] in HELP:
        width = max(map(len, SUBCOMMANDS))
        lines = [f"  {name.ljust(width)}  {text}" for name, (_, text) in SUBCOMMANDS.items()]
        sys.stdout.write(_ABOUT.format(lines="\n".join(lines)))
        return 0 if arguments else 2
    if arguments[0] not in SUBCOMMANDS:
        mend = near(arguments[0], SUBCOMMANDS)
        raise InputError(f"requests: unknown subcommand {arguments[0]!r}; {mend}")
    return SUBCOMMANDS[arguments[0]][0](arguments[1:])


def _add(arguments: list[str]) -> int:
    settings = parse(Add, arguments, "expunge requests add", "forget")
    added = add(settings, settings)
    request = added.request
    if settings.json:
        print_json(request.to_json(today()) | {"also_in": added.known})
        return 0
    due = "" if request.due is None else f", due {request.due}"
    sys.stdout.write(
        f"request {request.id}: {request.rows} rows of {request.forget}, received"
        f" {request.received}{due}\n"
    )
    for number, count in added.known.items():
        sys.stdout.write(f"  {count} of its rows are in request {number} as well\n")
    return 0


def _list(arguments: list[str]) -> int:
    settings = parse(List, arguments, "expunge requests list", "ledger")
    with open_ledger(settings) as ledger:
        requests = read_requests(ledger)
    if settings.json:
        print_json([request.to_json(today()) for request in requests])
    elif requests:
        _print(_table(requests))
    else:
        sys.stdout.write(f"{settings.ledger}: no requests\n")
    return 0


def _show(arguments: list[str]) -> int:
    settings = parse(Show, arguments, "expunge requests show", "id")
    with open_ledger(settings) as ledger, ledger.reading():
        request = read_request(ledger, settings.id)
        record = request.to_json(today()) | {
            "row_ids": [row_id for row_id, _ in read_rows_of(ledger, request.id)],
            "runs": [asdict(run) for run in read_runs(ledger) if request.id in run.requests],
            "verdicts": [asdict(verdict) for verdict in read_verdicts(ledger, request.id)],
            "events": [asdict(event) for event in read_events(ledger, request.id)],
        }
    if settings.json:
        print_json(record)
    else:
        _print(_table([request]), *_story(record))
    return 0


def _update(arguments: list[str]) -> int:
    settings = parse(Update, arguments, "expunge requests update", "id")
    given = {"forget": settings.forget, "retain": settings.retain, "due": settings.due}
    return _say(update(settings, settings.id, **given), "recorded")


def _withdraw(arguments: list[str]) -> int:
    settings = parse(Withdraw, arguments, "expunge requests withdraw", "id")
    return _say(withdraw(settings, settings.id), "withdrawn")


def _reopen(arguments: list[str]) -> int:
    settings = parse(Reopen, arguments, "expunge requests reopen", "id")
    return _say(reopen(settings, settings.id), "open again")


def _serve(arguments: list[str]) -> int:
    # A run's options and all that they bring are needed here only.
    from expunge.cli.console import progress_on_stderr
    from expunge.cli.run import parsed
    from expunge.ledger.serving import ServeInputs, serve

    settings, preset = parsed(arguments, "expunge requests serve", ServeInputs, _SERVE)
    inputs = settings.inputs
    with progress_on_stderr() as progress:
        served = serve(inputs, settings.settings, settings.training, progress, preset)
        if served is None:
            progress.message(f"{inputs.ledger}: no open requests; nothing to serve")
        else:
            numbers = ", ".join(map(str, served.requests))
            rows = served.manifest["rows"]["forget"]
            common = f" ({served.twice} in common)" if served.twice else ""
            progress.message(
                f"{inputs.output}: run {served.run} served the requests {numbers}: {rows} rows{common};"
                " verify it with expunge requests verify"
            )
    return 0


def _verify(arguments: list[str]) -> int:
    from expunge.cli.console import progress_on_stderr
    from expunge.ledger.verifying import VerifyInputs, verify

    @dataclass(frozen=True)
    class Verify(Printed, VerifyInputs):
        __doc__ = _VERIFY

    settings = parse(Verify, arguments, "expunge requests verify")
    with progress_on_stderr() as progress:
        verified = verify(settings, progress)
    if settings.json:
        print_json([asdict(each) for each in verified])
    elif verified:
        _print(
            *(
                f"request {each.request}: {each.state}: {each.verdict or 'no verdict'}:"
                f" {each.sentence} ({each.audit})"
                for each in verified
            )
        )
    else:
        sys.stdout.write(f"{settings.ledger}: no request was served; nothing to verify\n")
    return 0


def _export(arguments: list[str]) -> int:
    settings = parse(Export, arguments, "expunge requests export", "id")
    bundle = export(settings, settings.id, settings)
    signed = "signed" if bundle.signed_by else "not signed; --key signs it"
    sys.stdout.write(
        f"{settings.output}: {', '.join(bundle.files)} ({signed}); SHA-256 {bundle.sha256}\n"
    )
    for warning in bundle.warnings:
        sys.stdout.write(f"  {warning}\n")
    return 0


def _verify_bundle(arguments: list[str]) -> int:
    settings = parse(VerifyBundle, arguments, "expunge requests verify-bundle", "bundle")
    checked = check_bundle(settings.bundle, settings.public_key)
    if settings.json:
        print_json(asdict(checked))
    else:
        _print(*_said(checked, settings.bundle))
    return 0


SUBCOMMANDS: Mapping[str, tuple[Callable[[list[str]], int], str]] = {
    "add": (_add, "record a request; a missing ledger is made"),
    "list": (_list, "every request with its state, overdue ones marked"),
    "show": (_show, "one request's record"),
    "update": (_update, "record a moved file, another retain set, another last day"),
    "withdraw": (_withdraw, "a request is no longer to be served"),
    "reopen": (_reopen, "have a request served again"),
    "serve": (_serve, "one run for all open requests"),
    "verify": (_verify, "audit all served requests on today's model"),
    "export": (_export, "write the evidence of one request, signed if you like"),
    "verify-bundle": (_verify_bundle, "check such evidence"),
}


def _say(request: Request, what: str) -> int:
    due = "" if request.due is None else f", due {request.due}"
    sys.stdout.write(f"request {request.id}: {what} ({request.state}{due})\n")
    return 0


def _table(requests: Sequence[Request]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("request", "state", "received", "due", "rows", "verdict", "subject"):
        table.add_column(heading, overflow="fold")
    day = today()
    for request in requests:
        due = "-" if request.due is None else str(request.due)
        table.add_row(
            str(request.id),
            request.state,
            str(request.received),
            f"{due} overdue" if request.overdue(day) else due,
            str(request.rows),
            request.verdict or "-",
            request.subject or "-",
        )
    return table


def _story(record: Mapping[str, Any]) -> list[str]:
    """A request's record below its table."""
    lines = [f"forget: {record['forget']}", f"retain: {record['retain'] or '-'}"]
    lines += [f"row ids: {', '.join(record['row_ids'])}", "history:"]
    for event in record["events"]:
        more = f" (run {event['run']})" if event["run"] is not None else ""
        more += f" ({event['note']})" if event["note"] else ""
        lines.append(f"  {event['at']} {event['action']}{more}: {event['state']}, by {event['actor']}")
    for run in record["runs"]:
        state = f"complete {run['completed_at']}" if run["completed_at"] else "not completed"
        lines.append(f"run {run['id']}: {run['model']} -> {run['output']}, {state}")
    for verdict in record["verdicts"]:
        lines.append(
            f"verdict of {verdict['at']}: {verdict['verdict'] or 'none'}: {verdict['sentence']}"
            f" ({verdict['model']}; {verdict['audit']})"
        )
    return lines


def _said(checked: Checked, bundle: str) -> list[str]:
    lines = [
        f"{bundle}: request {checked.request} ({checked.state}), {len(checked.files)} files as listed"
    ]
    if checked.signed_by is None:
        lines.append("not signed: who made it is not shown")
    elif checked.key_given:
        lines.append(f"signed with the given key {checked.signed_by}")
    else:
        lines.append(
            f"signed with the key {checked.signed_by}, which the bundle brings itself; --public-key"
            " with the signer's shows that it is theirs"
        )
    return lines


def _print(*parts: Any) -> None:
    from expunge.reporting.tables import table_console

    console = table_console()
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
