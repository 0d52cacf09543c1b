"""A run that was carried out between machines, carried out again on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedloom.deploy.journal import Replayed
from fedloom.deploy.serve import FILE
from fedloom.errors import UsageError
from fedloom.runs.experiment import Experiment
from fedloom.runs.reading import understood
from fedloom.runs.record import Run
from fedloom.task import Task
from fedloom.tasks._apart import registration


def replayed(path: Path, out: Path | None = None, task: Task | None = None) -> Experiment:
    """The experiment that hears whom the run at `path` heard; `task` where its data were none that its spec names.

    Raises UsageError where clients had other data than are here.
    """
    record, engine = Run(path), Replayed(path)
    made = Experiment(record.spec, task, None, engine)
    with understood(path / FILE):
        about: dict[str, Any] = json.loads((path / FILE).read_text())
        for name, before in about["registered"].items():
            number = about["names"].index(name)
            here = json.loads(json.dumps(registration(made.task, number)))
            if here != {part: before[part] for part in here}:
                raise UsageError(
                    f"the client {name} of {path} had data of its own ({before['rows']} rows), and here are others "
                    f"({here['rows']}): only runs on data that this machine has are carried out again"
                )
    return made.begin(out)
