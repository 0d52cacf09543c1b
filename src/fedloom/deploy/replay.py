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
from fedloom.errors import RunError, UsageError
from fedloom.runs.experiment import Experiment
from fedloom.runs.reading import understood
from fedloom.runs.record import Run
from fedloom.task import Task
from fedloom.tasks._apart import registration

HERE = "localhost:1"  # nothing is dialled
MEASURED = ("train_loss", "global_test_", "validation_", "personal_test_")  # in rows: what was learned


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


def confirm(path: Path, again: Run) -> None:
    """Raises RunError where a run that was carried out again has other bits than the one at `path`."""
    before, why = Run(path), ""
    for row, other in zip(before.metrics, again.metrics, strict=False):
        told = [(name, value, other.get(name)) for name, value in row.items() if name.startswith(MEASURED)]
        if strange := [one for one in told if json.dumps(one[1]) != json.dumps(one[2])]:
            name, was, found = strange[0]
            why = f"from round {row['round']} on ({name} is {found}, and was {was})"
            break
    weights = [run.path / "model.safetensors" for run in (before, again)]
    if not why and all(file.exists() for file in weights) and weights[0].read_bytes() != weights[1].read_bytes():
        why = "in its model"
    if why:
        raise RunError(
            f"{again.path} has other bits than {path} {why}: its clients had other data than are here, or it ran on "
            "another version of PyTorch or another processor"
        )


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
