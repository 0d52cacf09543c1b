"""What a run on a stream of tasks has kept: accuracies after each task, forgetting, and backward transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

TESTS = ("global_test", "personal_test")  # where accuracies are taken from: the first that has those of single tasks


class Recorded(Protocol):
    """What is needed of a `Run`: what was dealt, and what was measured."""

    @property
    def partition(self) -> Mapping[str, Any]: ...

    @property
    def metrics(self) -> Sequence[Mapping[str, Any]]: ...


def after_each(run: Recorded) -> list[list[float | None]]:
    """The accuracy (T lists of T) of task j after training on task i; None before task j, and where none was measured.

    Taken is the last evaluated round of task i, on the global test if it has tasks, else on the clients' own.
    """
    if "rounds_per_task" not in (dealt := run.partition):
        return []
    lasting, count = int(dealt["rounds_per_task"]), len(dealt["tasks"])
    test = next((one for one in TESTS if any(f"{one}_task1" in row for row in run.metrics)), TESTS[0])
    found: list[list[float | None]] = [[None] * count for _ in range(count)]
    for row in run.metrics:
        task = min((row["round"] - 1) // lasting, count - 1)
        for j in range(task + 1):
            if row.get(f"{test}_task{j + 1}") is not None:
                found[task][j] = row[f"{test}_task{j + 1}"]
    return found


def matrices(run: Recorded) -> tuple[Tensor, Tensor]:
    """Accuracy [T, T] of task j after training on task i (NaN before it came), and forgetting [T] of each task.

    Forgetting is the accuracy right after a task was learned less the last one; 0 for the last task.
    """
    import torch

    rows = [[torch.nan if one is None else one for one in row] for row in after_each(run)]
    accuracy = torch.tensor(rows, dtype=torch.float64)
    return accuracy, accuracy.diagonal() - accuracy[-1]


def continual(run: Recorded) -> dict[str, float]:
    """The measures of a run on a stream; none of a run on anything else, or on which a task was never measured.

    `incremental_accuracy` is the mean over tasks of the accuracy on all tasks so far, right after each (every task
    counting alike); `forgetting` the mean over all tasks but the last of the best accuracy before the last task less
    the final one [Chaudhry et al. 2018, arXiv 1801.10112]; `backward_transfer` the mean of the final accuracy less that
    right after the task was learned [Lopez-Paz, Ranzato 2017, arXiv 1706.08840].
    """
    rows = after_each(run)
    known = [[one for one in row[: i + 1] if one is not None] for i, row in enumerate(rows)]
    if not rows or any(len(row) <= i for i, row in enumerate(known)):
        return {}
    found = {"incremental_accuracy": mean([mean(row) for row in known])}
    if len(known) > 1:
        *before, last = known
        learned = last[:-1]
        found["forgetting"] = mean([max(row[j] for row in before[j:]) - now for j, now in enumerate(learned)])
        found["backward_transfer"] = mean([now - before[j][j] for j, now in enumerate(learned)])
    return found


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers."""
    return fsum(values) / len(values)
