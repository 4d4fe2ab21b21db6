"""The command `expunge`: finds the subcommand, turns errors into one line and an exit code."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, TextIO

import expunge
from expunge.disk import explained
from expunge.errors import ExpungeError, InputError, is_out_of_memory, near, place_of
from expunge.processes import launched
from expunge.terminal import plain_streams, quiet, speaks

COMMANDS = {
    "demo": ("expunge.cli.demo", "unlearn the built-in benchmark, end with scorecards and reports"),
    "erase": ("expunge.cli.erase", "the whole way: unlearn, score, attack, report, in one command"),
    "run": ("expunge.cli.run", "unlearn a model: rows to remove, rows to keep, a method"),
    "plan": ("expunge.cli.plan", "say what a run would take: memory, disk, steps, whether it fits"),
    "oracle": ("expunge.cli.oracle", "train a base on the rows to keep alone, to compare with"),
    "evaluate": ("expunge.cli.evaluate", "measure a model's scorecard"),
    "analyze": ("expunge.cli.analyze", "look before unlearning: analyze layers, analyze influence"),
    "audit": ("expunge.cli.audit", "attack an unlearned model: does forgotten content come back?"),
    "compare": ("expunge.cli.compare", "print the scorecards of several runs side by side"),
    "report": ("expunge.cli.report", "write what a run did and reached: a page, Markdown, JSON"),
    "view": ("expunge.cli.view", "show a page: target and unlearned model side by side"),
    "data": ("expunge.cli.data", "check rows and show how they are tokenised (data inspect)"),
    "sweep": ("expunge.cli.sweep", "search over options of a run; resumable, with many workers"),
    "requests": (
        "expunge.cli.requests",
        "keep erasure requests: add, serve, verify, show evidence",
    ),
    "benchmark": ("expunge.cli.benchmark", "make the built-in benchmark (benchmark build)"),
}
_OLD_NAMES = {"serve": "view"}

_QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_LESS_MEMORY = {
    "demo": "lower --documents",
    "view": "use --dtype bfloat16",
    **dict.fromkeys(
        ("erase", "run", "oracle", "sweep", "analyze layers", "requests serve"),
        "lower --micro-batch-size; expunge plan says what fits",
    ),
    **dict.fromkeys(
        ("evaluate", "audit", "analyze influence", "requests verify"),
        "lower --batch-size, or use --dtype bfloat16",
    ),
}
"""What takes less, by command; the others have no such option."""
_STANDS = "what the command wrote to files stands"
# Threads that wait busily for each other slow a run tenfold where anything else uses a core.
_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
_HEAD_START = 15.0
"""Seconds that the others of a launch leave the first to say why all end; its end cuts them short."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 done, 1 failed while running, 2 wrong input or usage.

    141, as of a process that SIGPIPE ends, where nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the terminal's encoding lacks is shown by its number, and no work is lost.
            stream.reconfigure(errors="backslashreplace")
    # Who calls this from Python goes on afterwards, as loud as before and ended by the same signals.
    was_quiet = quiet.set(False)
    ends = threading.current_thread() is threading.main_thread()
    was_ended = signal.signal(signal.SIGTERM, _terminate) if ends else None
    try:
        with plain_streams():
            return _flushed(_run(arguments))
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        for stream in filter(_is_unread, (sys.stdout, sys.stderr)):
            # What is buffered would fail again as Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    finally:
        quiet.reset(was_quiet)
        if was_ended is not None:
            signal.signal(signal.SIGTERM, was_ended)


def _flushed(code: int) -> int:
    """The exit code once all is written; a full disk is said once."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == 0:
            sys.stderr.write(
                f"expunge: standard output: {error.strerror}; write it elsewhere; {_STANDS}\n"
            )
        return code or 1
    return code


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has left."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError):  # Windows; no file
        return False


def _run(arguments: Sequence[str] | None) -> int:
    # Standard error is the command's: what libraries show beside it would break its one line.
    for variable, value in (_QUIET_LIBRARIES | _THREADS).items():
        os.environ.setdefault(variable, value)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    quiet.set("--quiet" in given[1:])
    given[1:] = [argument for argument in given[1:] if argument != "--quiet"]
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if given else 2
    if given[0] == "--version":
        sys.stdout.write(f"expunge {expunge.__version__}\n")
        return 0
    try:
        _check_launch()
        given[0] = _OLD_NAMES.get(given[0], given[0])
        if given[0] not in COMMANDS:
            raise _unknown_command(given)
        code = import_module(COMMANDS[given[0]][0]).main(given[1:])
    except SystemExit as stop:  # --help of a subcommand
        return stop.code if isinstance(stop.code, int) else 0
    except ExpungeError as error:
        if debug:
            raise
        if speaks():  # the other processes of a launch meet the same
            sys.stderr.write(f"expunge: {' '.join(str(error).split())}\n")
        else:
            _let_the_first_speak()
        return error.exit_code
    except KeyboardInterrupt as stop:
        if debug:
            raise
        if speaks():
            sys.stderr.write("expunge: interrupted; what was unfinished has been removed\n")
        return 143 if isinstance(stop, _Terminated) else 130
    except Exception as error:
        if debug or (isinstance(error, BrokenPipeError) and _is_unread(sys.stdout)):
            raise
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        # The message of an unexpected error may quote a row, so its type and place must do.
        said = f"internal error ({place_of(error)}){notes}; run again with --debug for the traceback"
        if is_out_of_memory(error):
            less = _LESS_MEMORY.get(given[0]) or _LESS_MEMORY.get(" ".join(given[:2]))
            said = f"out of memory; {less or 'use a machine with more'}{notes}"
        elif isinstance(error, OSError) and error.errno is not None:
            if _flushed(0):  # it was standard output
                return 1
            said = f"{explained(error)}{notes}"
        sys.stderr.write(f"expunge: {said}\n")
        return 1
    return int(code or 0)


def entry() -> NoReturn:
    """The console script: `main`, then the end of the process.

    One of several processes ends without Python's finalisation: gloo's threads may still hold tensors
    then, and whichever asks for the interpreter's lock aborts the process after its work was done
    (https://github.com/pytorch/pytorch/issues/190489; destroying the groups makes it rarer only).
    """
    code = main()
    if launched() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _check_launch() -> None:
    """Raises InputError where what a launcher sets for each process is no number."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not re.fullmatch("[0-9]{1,6}", value):
            raise InputError(f"{name}={value[:20]}: is no number of processes; unset the variable")


def _let_the_first_speak() -> None:
    """The launcher ends all processes as soon as one has ended, and the first may be a little later."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_HEAD_START)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: schedulers and `timeout` send it, and scratch files must go then too."""


def _terminate(_signal: int, _frame: object) -> None:
    raise _Terminated


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: expunge COMMAND ...",
            "",
            "Removes what a language model has memorised, keeps everything else,"
            " and measures how far it got.",
            "",
            *lines,
            "",
            "expunge COMMAND --help tells a command's options, --help-all all of them.",
            "Every command takes --config FILE (options from YAML), --quiet (no progress) and",
            "--debug (tracebacks, which may quote rows). expunge --version.",
            "",
        ]
    )


def _unknown_command(given: Sequence[str]) -> ExpungeError:
    name = given[0]
    if name.startswith("-"):
        command = next((word for word in given if word in COMMANDS), "COMMAND")
        return InputError(f"{name}: options follow the command; write expunge {command} {name} ...")
    return InputError(f"unknown command {name!r}; {near(name, COMMANDS)}")


if __name__ == "__main__":
    entry()
