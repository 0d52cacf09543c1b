"""A stream of tasks over labelled data: training sees one task after the other, measuring all that have come so far."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.task import Batch, Data, Scores
from fedloom.tasks import classification
from fedloom.tasks.classification import JUDGED_AT_ONCE, Classification
from fedloom.tasks.toy import Toy

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec


class Streamed:
    """What every stream has: `tasks` of them, `lasting` rounds each, of which number `now` (from 0) is being learned.

    What is judged grows with every task, so that accuracies of rounds compare within a task only: the result of a run
    is the round that validation chooses among those after the last task came, whose test has all tasks.

    `classes_of` is, for a task, the classes that it has; a sample is judged, and learned, among those of its own task.
    """

    tasks: int
    lasting: int
    now: int
    classes_of: Tensor  # bool [tasks, C]

    def number(self, round: int) -> int:
        """The task of a round (from 1); the last one stays."""
        return min(max(round - 1, 0) // self.lasting, self.tasks - 1)

    def stage(self, round: int) -> int:
        """How many tasks are judged in a round: those that have come by then."""
        return self.number(round) + 1

    def ends(self, round: int) -> bool:
        """Whether a task's training ends with this round."""
        return round % self.lasting == 0 and round <= self.tasks * self.lasting

    def task_of(self, data: Data) -> Tensor:
        """The task of every sample, int64 [n]."""
        return self.classes_of.to(data.labels.device).int().argmax(0)[data.y]

    def judged(self, scores: Scores, data: Data) -> dict[str, float]:
        """Measures over the samples of all tasks so far, and the accuracy of each task by itself."""
        task = self.task_of(data)
        loss, right = [], []
        start = 0
        for x, y in data.pieces(JUDGED_AT_ONCE):
            out = self.within(scores(x), task[start : start + len(y)])
            loss.append(F.cross_entropy(out, y, reduction="none").double())
            right.append((out.argmax(1) == y).double())
            start += len(y)
        losses, rights = torch.cat(loss), torch.cat(right)
        each = {f"task{t + 1}": float(rights[task == t].mean()) for t in range(self.tasks) if (task == t).any()}
        return {"n": len(data), "loss": float(losses.mean()), "accuracy": float(rights.mean())} | each

    def within(self, scores: Tensor, task: Tensor | int) -> Tensor:
        """Scores [B, C] in which the classes of other tasks than the samples' own cannot win."""
        mask = self.classes_of.to(scores.device)[task]
        return scores.masked_fill(~mask, -1e9)


@dataclass(frozen=True)
class Stream(Streamed, Classification):
    """Class-incremental: the classes are cut into groups, in a seeded order, and each task is one group's samples.

    A client's `train` has the current task only; `validation`, `test` and the global test have all tasks so far. The
    current task is that of the round: `at(round)`.
    """

    tasks: int = 5
    lasting: int = 10
    seed: int = 0
    now: int = 0

    @property
    def classes_of(self) -> Tensor:  # type: ignore[override]
        order = torch.randperm(self.classes, generator=stream(self.seed, "data", "stream")).tolist()
        mask = torch.zeros(self.tasks, self.classes, dtype=torch.bool)
        for t, group in enumerate(np.array_split(order, self.tasks)):
            mask[t, group] = True
        return mask

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"stream"}

    def at(self, round: int) -> Stream:
        now = self.number(round)
        return self if now == self.now else replace(self, now=now)

    def data(self, client: int, split: str) -> Data:
        return self._kept(super().data(client, split), split == "train")

    def present(self, client: int) -> bool:
        return len(self.data(client, "train")) > 0

    def global_test(self) -> Data:
        return self._kept(super().global_test(), False)

    def _kept(self, data: Data, only_now: bool) -> Data:
        task = self.task_of(data)
        return replace(data, rows=data.taken(None)[task == self.now if only_now else task <= self.now])

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(self.within(outputs, self.now), batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return self.judged(scores, data)

    def describe(self) -> dict[str, Any]:
        groups = [mask.nonzero().flatten().tolist() for mask in self.classes_of]
        return super().describe() | {"tasks": groups, "rounds_per_task": self.lasting}


def build(spec: Spec, tasks: int = 5, rounds: int = 10) -> Stream:
    """The data of a run's settings as a stream: `stream:5,rounds=10` is five tasks of ten rounds each."""
    whole = classification.build(spec)
    if not 1 <= tasks <= whole.classes or rounds < 1:
        raise UsageError(
            f"problem {spec.problem!r}: {tasks} tasks of {rounds} rounds; expected 1 to {whole.classes} tasks (of at "
            "least one class each), and at least one round"
        )
    if spec.rounds <= (tasks - 1) * rounds:
        raise UsageError(
            f"problem {spec.problem!r} has {tasks} tasks of {rounds} rounds, but rounds is {spec.rounds}, in which not "
            f"all of them come; set rounds={tasks * rounds}, or stream:{tasks},rounds={max(1, spec.rounds // tasks)}"
        )
    return Stream(
        **{f.name: getattr(whole, f.name) for f in fields(whole)}, tasks=tasks, lasting=rounds, seed=spec.seed
    )


class StreamToy(Streamed, Toy):
    """Toy's clouds of points; from the third round on, as a second task, the same with their inputs turned round."""

    tasks, lasting, now = 2, 2, 0
    classes_of = torch.ones(2, 3, dtype=torch.bool)
    offers = frozenset({"public", "shared_data", "stream"})
    goal = ("accuracy", 0.6)  # the network is small for two tasks

    def __init__(self, sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False) -> None:
        super().__init__(sizes, norm)
        self.half = len(self.y)
        self.x, self.y = torch.cat([self.x, self.x.flip(1)]), torch.cat([self.y, self.y])

    def at(self, round: int) -> StreamToy:
        if self.number(round) == self.now:
            return self
        moved = copy.copy(self)
        moved.now = self.number(round)
        return moved

    def task_of(self, data: Data) -> Tensor:
        return data.taken(None) // self.half

    def data(self, client: int, split: str) -> Data:
        first = super().data(client, split)
        rows = first.taken(None)
        if split == "train":
            return replace(first, rows=rows + self.now * self.half)
        return replace(first, rows=torch.cat([rows + task * self.half for task in range(self.now + 1)]))

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return self.judged(scores, data)


def toy(sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False) -> StreamToy:
    """A small one, for the contract of methods."""
    return StreamToy(sizes, norm)


class Recorded(Protocol):
    """What is needed of a `Run`: what was dealt, and what was measured."""

    @property
    def partition(self) -> Mapping[str, Any]: ...

    @property
    def metrics(self) -> Sequence[Mapping[str, Any]]: ...


def matrices(run: Recorded) -> tuple[Tensor, Tensor]:
    """Accuracy [T, T] of task j after training on task i (NaN before it came), and forgetting [T] of each task.

    Forgetting is the accuracy right after a task was learned less the last one; 0 for the last task.
    """
    lasting = int(run.partition["rounds_per_task"])
    count = len(run.partition["tasks"])
    accuracy = torch.full((count, count), torch.nan, dtype=torch.float64)
    for row in run.metrics:
        task = min((row["round"] - 1) // lasting, count - 1)
        for j in range(task + 1):
            if row.get(f"global_test_task{j + 1}") is not None:
                accuracy[task, j] = row[f"global_test_task{j + 1}"]
    return accuracy, accuracy.diagonal() - accuracy[-1]
