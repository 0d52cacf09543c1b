"""The command line: `fedloom run fedavg` and what goes with it. Nothing here imports torch until a run needs it."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from fedloom.errors import RunError, UsageError
from fedloom.letters import LOOK_ALIKE, printable

# The parent of what typer raises for arguments that do not fit; typer keeps its own copy of click since 0.20.
Unfitting: Any = typer.BadParameter.__base__


LONGEST = 2000  # characters of an error


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does."""


def main(args: Sequence[str] | None = None) -> int:
    """Carries out a command line (default: that of the process) and returns its exit code.

    0: done; 1: it failed; 2: the request cannot be carried out as it stands; 130 and 143: stopped by SIGINT, SIGTERM.
    """
    from fedloom.cli.commands import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know ASCII only, or cp1252
            stream.reconfigure(errors=LOOK_ALIKE)
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    words = [word for word in given if word != "--debug"] or ["--help"]
    try:
        with _terminable(), _warned():
            command = typer.main.get_command(app(words))
            with command.make_context("fedloom", words) as context:
                command.invoke(context)
    except typer.Exit as ending:
        return ending.exit_code
    except KeyboardInterrupt as stop:
        _tell(str(stop) or "stopped; nothing was written")
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 1
    except Exception as error:  # noqa: BLE001 - whatever happens ends in one line
        if debug:
            traceback.print_exc()
        else:
            _tell(f"error: {_said(error)}")
        return 2 if isinstance(error, UsageError | Unfitting) else 1
    return 0


def _said(error: Exception) -> str:
    if isinstance(error, Unfitting):
        command = error.ctx.command_path if error.ctx else "fedloom"
        return f"{error.format_message().rstrip('.')}; see: {command} --help"
    if isinstance(error, UsageError | RunError):
        return str(error)
    return f"{type(error).__name__}: {error}; run again with --debug for the traceback"


def _tell(line: str) -> None:
    whole = printable(" ".join(line.split()))
    typer.echo(f"fedloom: {whole if len(whole) <= LONGEST else whole[:LONGEST] + ' ...'}", err=True)


@contextmanager
def _warned() -> Iterator[None]:
    """What the library warns of is a line of standard error, as its errors are, and not a place in its source."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any, **how: Any) -> None:
        if category is UserWarning:
            _tell(f"warning: {message}")
        else:
            before(message, category, *place, **how)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
