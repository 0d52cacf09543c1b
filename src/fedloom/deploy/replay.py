"""A run that was carried out between machines, carried out again on one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.data.files import COLUMNS
from fedloom.deploy.config import ClientConfig, DataConfig
from fedloom.deploy.journal import Replayed
from fedloom.deploy.own import brought
from fedloom.deploy.serve import FILE
from fedloom.errors import UsageError
from fedloom.runs.experiment import Experiment
from fedloom.runs.reading import understood
from fedloom.runs.record import Run
from fedloom.task import Task
from fedloom.tasks._apart import registration

HERE = "localhost:1"  # nothing is dialled


def replayed(
    path: Path, out: Path | None = None, task: Task | None = None, data: Mapping[str, ClientConfig] | None = None
) -> Experiment:
    """The experiment that hears whom the run at `path` heard.

    `data` say where clients, by name, have rows of their own; `task` is the problem where its data were none that its
    spec names. Raises UsageError where clients had other data than are here.
    """
    record, engine = Run(path), Replayed(path)
    with understood(path / FILE):
        about: dict[str, Any] = json.loads((path / FILE).read_text())
        names = about["names"]
    if strange := [name for name in data or () if name not in names]:
        raise UsageError(f"{path} had no client {strange[0]!r}; it had {', '.join(names)}")
    if data or record.spec.data.endswith(COLUMNS):
        task = brought(record.spec, {names.index(name): config for name, config in (data or {}).items()})
    made = Experiment(record.spec, task, None, engine)
    with understood(path / FILE):
        for name, before in about["registered"].items():
            number = names.index(name)
            here = json.loads(json.dumps(registration(made.task, number)))
            if here != {part: before[part] for part in here}:
                raise UsageError(
                    f"the client {name} of {path} had data of its own ({before['rows']} rows), and here are others "
                    f"({here['rows']}); say where those are of each client that had some: --data {name}=FILE, or "
                    f"--data {name}=CLIENT.toml, the settings that it ran with"
                )
    return made.begin(out)


def places(texts: Sequence[str]) -> dict[str, ClientConfig]:
    """Where clients have their data, of texts NAME=FILE, NAME=FILE.py:FUNCTION or NAME=CLIENT.toml."""
    found = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or not name or not place:
            raise UsageError(f"--data {text} is not of the form NAME=FILE, as in --data north=patients.csv")
        if name in found:
            raise UsageError(f"--data names the client {name} twice; once is enough")
        if place.endswith(".toml"):
            found[name] = ClientConfig.read(Path(place))
        else:
            given = DataConfig(loader=place) if ".py:" in place else DataConfig(file=place)
            found[name] = ClientConfig(Path(), HERE, given)
    return found
