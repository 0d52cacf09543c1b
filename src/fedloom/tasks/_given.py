"""Tasks that users make in Python: what is wrong with one is told before the first round."""

from __future__ import annotations

from fedloom.errors import UsageError
from fedloom.quality import known
from fedloom.task import Task

SOUNDED = 1000  # clients, at most, whose labels are looked at


def sound(task: Task) -> None:
    """Raises UsageError for slips that would end in the middle of a run: no clients, labels that are no class."""
    name = type(task).__name__
    if not isinstance(task.population, int) or task.population < 1:
        raise UsageError(f"{name}.population is {task.population!r}; expected a whole number of clients from 1")
    known(name, task.qualities)
    if not isinstance(task.newcomers, int) or task.newcomers < 0:
        raise UsageError(f"{name}.newcomers is {task.newcomers!r}; expected a whole number of clients from 0")
    for client in range(min(task.population + task.newcomers, SOUNDED) if task.classes else 0):
        for split in ("train", "validation", "test"):
            labels = task.data(client, split).y
            if labels.dim() == 1 and not labels.is_floating_point() and len(labels) and labels.max() >= task.classes:
                raise UsageError(
                    f"{name}.data: client {client} has the label {int(labels.max())} in {split}, but the task's "
                    f"{task.classes} classes are numbered from 0 to {task.classes - 1}; number the labels so"
                )
