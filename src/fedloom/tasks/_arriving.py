"""When samples come in a stream: the number of the task, from 0, with which each of them does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedloom.random import numpy_stream, stream
from fedloom.task import Data

LEAST = 1e-9  # what a class has of every mixture, so that each sample comes some time


@dataclass(frozen=True)
class Dated(Data):
    """Samples that know with which task they came: `tasks`, int64 [n]."""

    tasks: Tensor | None = None

    @staticmethod
    def of_data(data: Data, tasks: Tensor) -> Dated:
        """Data whose samples came with these tasks, int64 [n]."""
        return Dated(data.inputs, data.labels, data.rows, data.metadata, tasks)

    def when(self, keep: Callable[[Tensor], Tensor]) -> Dated:
        """Those whose task `keep` says yes to, bool [n]."""
        assert self.tasks is not None
        kept = keep(self.tasks)
        return replace(self, rows=self.taken(None)[kept], tasks=self.tasks[kept])


@dataclass(frozen=True)
class Plan:
    """How a stream of `tasks` deals the samples of `clients`, of whom the first `population` train, over its tasks."""

    tasks: int
    classes: int
    population: int
    clients: int
    seed: int

    def comes(self, client: int, split: str, labels: Tensor) -> Tensor:
        """The task of each of a client's samples with these labels [n], int64 [n]."""
        raise NotImplementedError

    def comes_to_all(self, labels: Tensor) -> Tensor:
        """The task of each sample of the global test, int64 [n]: here all are there from the start."""
        return torch.zeros(len(labels), dtype=torch.int64, device=labels.device)


@dataclass(frozen=True)
class ByClass(Plan):
    """Classes come in groups, in the same seeded order at every client: `group` [C] is the task of each class."""

    @cached_property
    def group(self) -> Tensor:
        order = torch.randperm(self.classes, generator=stream(self.seed, "data", "stream")).tolist()
        found = torch.zeros(self.classes, dtype=torch.int64)
        for task, group in enumerate(np.array_split(order, self.tasks)):
            found[group] = task
        return found

    @property
    def first(self) -> Tensor:
        """The task with which each class comes to anybody who trains, int64 [C]."""
        return self.group

    def comes(self, client: int, split: str, labels: Tensor) -> Tensor:
        return self.group.to(labels.device)[labels]

    def comes_to_all(self, labels: Tensor) -> Tensor:
        return self.first.to(labels.device)[labels]


@dataclass(frozen=True)
class Missions(ByClass):
    """The same groups of classes, in an order of its own at every client."""

    @cached_property
    def places(self) -> Tensor:
        """The task with which each group comes to each client, int64 [K, tasks]."""
        draw = stream(self.seed, "data", "missions")
        return torch.rand(self.clients, self.tasks, generator=draw).argsort(1).argsort(1)

    @property
    def first(self) -> Tensor:
        return self.places[: self.population].amin(0)[self.group]

    def comes(self, client: int, split: str, labels: Tensor) -> Tensor:
        return self.places[client][self.group].to(labels.device)[labels]


@dataclass(frozen=True)
class Samples(Plan):
    """A client's training samples come in a random order, nearly as many with every task; its tests change nothing."""

    def comes(self, client: int, split: str, labels: Tensor) -> Tensor:
        if split != "train":
            return self.comes_to_all(labels)
        order = torch.randperm(len(labels), generator=stream(self.seed, "data", "samples", client))
        return (order * self.tasks // max(1, len(labels))).to(labels.device)


@dataclass(frozen=True)
class Drift(Plan):
    """Each client's mixture of classes moves from one Dirichlet(alpha) draw of its own to another, in equal steps.

    A class's samples, each of which comes once, are dealt over the tasks in proportion to its part of the mixtures; so
    are those of the client's tests.
    """

    alpha: float = 0.3

    def mixtures(self, client: int) -> Tensor:
        """The part of each class in each of a client's tasks, float64 [tasks, C]."""
        draw = numpy_stream(self.seed, "data", "drift", client)
        ends = torch.from_numpy(draw.dirichlet(np.full(self.classes, self.alpha), size=2)) + LEAST
        step = torch.linspace(0, 1, self.tasks, dtype=torch.float64)[:, None]
        return (1 - step) * ends[0] + step * ends[1]

    def comes(self, client: int, split: str, labels: Tensor) -> Tensor:
        found = torch.zeros(len(labels), dtype=torch.int64)
        mixtures, own = self.mixtures(client), labels.cpu()
        order = torch.randperm(len(labels), generator=stream(self.seed, "data", "drift", client, split))
        for label in own.unique().tolist():
            rows = order[own[order] == label]
            until = (mixtures[:, label] / mixtures[:, label].sum()).cumsum(0)  # of its samples, by the end of each task
            middles = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
            found[rows] = torch.searchsorted(until[:-1].contiguous(), middles)
        return found.to(labels.device)


PLANS = {"classes": ByClass, "missions": Missions, "drift": Drift, "samples": Samples}
