"""A run that goes on in a terminal: carried out as it is watched, and what is told when it is over."""

from __future__ import annotations

import gc
import shlex
from typing import TYPE_CHECKING

from fedloom.cli import output

if TYPE_CHECKING:
    from fedloom.cli.progress import Watch
    from fedloom.runs.experiment import Experiment
    from fedloom.runs.record import Run


def carried_out(experiment: Experiment, watch: Watch, again: str | None = None) -> Run:
    """The record of an experiment that was carried out; where it is stopped, `again` is the command that goes on."""
    from fedloom.report import write

    watch.begin(experiment)
    gc.freeze()  # what was imported and loaded is no garbage, and with many clients at work it is looked through often
    try:
        record = experiment.go(watch)
        write(record)
        return record
    except KeyboardInterrupt as stop:
        go_on = again or f"fedloom resume {shlex.quote(str(experiment.record.path))}"
        stop.args = (f"stopped after round {experiment.done} of {experiment.spec.rounds}; go on with: {go_on}",)
        raise
    finally:
        gc.unfreeze()


def tell_end(ended: Run, as_json: bool) -> None:
    """Prints the results of a run."""
    from fedloom.cli.tables import console, print_results, spent, summary
    from fedloom.report.words import kept

    found = summary(ended)
    if as_json:
        output.tell_json(found)
        return
    out = console()
    print_results(out, found)
    if why := found["manifest"].get("stopped_because"):
        out.print(f"ended early: {why}", soft_wrap=True)
    if found["continual"]:
        out.print(kept(found["continual"]))
    if found["baseline"]:
        out.print(found["baseline"], soft_wrap=True)
    out.print(f"{spent(found)}; {found['report'] or found['path']}", soft_wrap=True)
