"""Rows of a run's problem counted by what is true of them and what its models say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedloom import inputs, tasks
from fedloom.data.given import Given, require_same
from fedloom.errors import UsageError, unknown
from fedloom.runs.confusion import Confusion, kept
from fedloom.runs.shown import Shown
from fedloom.runs.trained import WHICH, Trained
from fedloom.scoring import collected
from fedloom.task import Data, Task

if TYPE_CHECKING:
    from fedloom.runs.parts import Parts
    from fedloom.vector import Vector

SPLITS = ("train", "validation", "test")
ALL = "all"  # every client, each by the model that it would use


def class_names(task: Task) -> tuple[str, ...] | None:
    """The names of a task's classes; None where neither a row nor a pixel has one class."""
    names = task.outputs().get("classes", ())
    if task.answer == "mask":
        return tuple(map(str, names))
    if task.answer != "class":
        return None
    return tuple(map(str, names if len(names) == task.classes else range(task.classes)))


def counted(task: Task, scores: Callable[[Tensor], Tensor], data: Data) -> np.ndarray | None:
    """How a function from inputs to outputs takes the rows of data, int64 [C, C]; None if outputs are not by class.

    Of masks it counts pixels.
    """
    classes = len(class_names(task) or ())
    if not len(data):
        return np.zeros((classes, classes), dtype=np.int64)
    with torch.no_grad():
        if scores(data.at(data.taken(None)[:1]).x).shape[1:] != (classes, *data.labels.shape[1:]):
            return None
        if task.answer == "mask":
            return np.asarray(collected(("pairs",), task, scores, data)["pairs"].sum(0))
        found = collected(("said",), task, scores, data)
    pairs = np.bincount(found["truth"] * classes + found["said"], minlength=classes * classes)
    return pairs.reshape(classes, classes)


def confusions(parts: Parts, round: int, model: Vector | None, clients: Mapping[int, Any]) -> dict[str, Any]:
    """What a run keeps of the round that validation chose: of the global model, and of those of clients together.

    `model` was judged on the global test, each of `clients` on its own test rows. Nothing of problems without classes.
    """
    task = parts.site.task_at(round)
    if (names := class_names(task)) is None:
        return {}

    def taken(w: Vector, data: Data) -> np.ndarray | None:
        return counted(task, partial(parts.server.scores, w.to(parts.site.device)), data)

    found: dict[str, Any] = {"round": round, "classes": names, "global": None, "personal": None}
    test = task.global_test()
    if model is not None and len(test) and (matrix := taken(model, test)) is not None:
        found["global"] = Confusion(matrix, names).stored()
    each = [taken(clients[client]["model"], task.data(client, "test")) for client in sorted(clients)]
    if having := [matrix for matrix in each if matrix is not None]:
        found["personal"] = Confusion(np.sum(having, 0), names).stored()
    return found


class Recorded(Shown, Protocol):
    """What is needed of a `Run`: its files, and what it was given where that was in Python."""

    forms: dict[str, nn.Module]
    given: Task | Given | None


def confusion(run: Recorded, client: int | str | None, split: str, which: str, task: Task | Any) -> Confusion:
    """See `Run.confusion`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if which not in WHICH:
        raise unknown("round of a model", which, WHICH)
    if isinstance(client, str) and client != ALL:
        raise UsageError(f"client is {client!r}; it is a number, {ALL!r} for all clients, or None for the global model")
    trained = Trained(run.path, run.forms)
    about = trained.about
    at_hand = None if isinstance(client, int) else kept(run, "global" if client is None else "personal")
    if at_hand and (split, which) == ("test", "chosen"):
        return at_hand
    whole = _problem(run, task)
    if (names := class_names(whole)) is None:
        raise UsageError(
            f"{run.path}: a confusion matrix is of problems with one class a row; this is a {type(whole).__name__}"
        )
    own = about["clients"] if client is not None else None  # models of clients, where the method makes some
    now = whole.at((own or about["weights"])[which]["round"])
    one = trained.module(which) if own is None else None
    parts: list[tuple[nn.Module, Data]]
    if one and client is None and split == "test":
        parts = [(one, now.global_test())]
    else:
        everybody = range(about["population"]) if own is None else map(int, own[which]["of"])
        clients = [client] if isinstance(client, int) else [*everybody]
        if not clients and own is not None:
            raise UsageError(f"{run.path} has no models of clients: {own[which]['why']}")
        parts = [(one or trained.client_module(k, which), now.data(k, split)) for k in clients]
    matrix = np.zeros((len(names), len(names)), dtype=np.int64)
    for net, data in parts:
        if (more := counted(now, net, data)) is None:
            raise UsageError(f"{run.path}: its network does not have one output for each of {len(names)} classes")
        matrix += more
    return Confusion(matrix, names)


def _problem(run: Recorded, task: Any) -> Task:
    """The task of a run, read again; raises UsageError where its data are others by now, or only Python has them."""
    spec = run.spec
    given = run.given if task is None else task if isinstance(task, Task) else Given.of(task)
    if given is None and spec.in_python:
        raise UsageError(
            f"the data of {run.path} are {spec.data}; give them again: run.confusion(..., task=...), as in resume"
        )
    anew = f"fedloom run {run.path / 'spec.yaml'} --out NEW_FOLDER"
    inputs.checked((), run.manifest.get("inputs"), run.path, anew, trust=True)
    whole = given if isinstance(given, Task) else tasks.build(spec, given)
    if "data" in run.partition:
        require_same(whole.describe().get("data"), run.partition["data"], spec.data)
    return whole
