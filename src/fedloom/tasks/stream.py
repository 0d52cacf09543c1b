"""A stream of tasks over any problem with labelled rows: training sees one task after the other, and no data of before.

What comes with a task is said by `by`: a group of classes, the same for all (`classes`) or in an order of its own at
every client (`missions`); samples of a mixture of classes that moves (`drift`); or simply more samples (`samples`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.errors import UsageError, unknown
from fedloom.task import Batch, Data, Scores, Task
from fedloom.tasks import layer
from fedloom.tasks._arriving import PLANS, ByClass, Dated, Drift, Plan
from fedloom.tasks._over import Over
from fedloom.tasks.classification import JUDGED_AT_ONCE
from fedloom.tasks.toy import Toy

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

TASKS_TOLD = ("classes", "missions")  # the kinds of stream in which a sample's task may be told
NEVER = -1e9  # the score of a class that cannot win


@dataclass(frozen=True, eq=False)
class Streamed(Over):
    """What every stream has: `tasks` of them, `lasting` rounds each, of which number `now` (from 0) is being learned.

    What is judged grows with every task, so that accuracies of rounds compare within a task only: the result of a run
    is the round that validation chooses among those after the last task came, whose test has all tasks.
    """

    tasks: int = 5
    lasting: int = 10
    now: int = 0

    def number(self, round: int) -> int:
        """The task of a round (from 1); the last one stays."""
        return min(max(round - 1, 0) // self.lasting, self.tasks - 1)

    def stage(self, round: int) -> int | None:
        """How many tasks are judged in a round: those that have come by then."""
        return self.number(round) + 1

    def ends(self, round: int) -> bool:
        """Whether a task's training ends with this round."""
        return round % self.lasting == 0 and round <= self.tasks * self.lasting

    def at(self, round: int) -> Self:
        now, inner = self.number(round), self.inner.at(round)
        return self if now == self.now and inner is self.inner else replace(self, now=now, inner=inner)

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"stream"}

    def within(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Scores [B, C] in which no class can win that samples with these labels [B] are not judged among."""
        return scores

    def answers(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().answers(self.within(outputs, y), y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        """Measures over the samples of all tasks so far, and the accuracy of each task by itself."""
        loss, right = [], []
        for x, y in data.pieces(JUDGED_AT_ONCE):
            out = self.within(scores(x), y)
            loss.append(F.cross_entropy(out, y, reduction="none").double())
            right.append((out.argmax(1) == y).double())
        losses, rights = torch.cat(loss), torch.cat(right)
        found = {"n": len(data), "loss": float(losses.mean()), "accuracy": float(rights.mean())}
        task = data.tasks if isinstance(data, Dated) else None
        if task is None:
            return found
        return found | {f"task{t + 1}": float(rights[task == t].mean()) for t in range(self.tasks) if (task == t).any()}


@dataclass(frozen=True, eq=False)
class Stream(Streamed):
    """A problem whose samples come over `tasks`: `Stream(task, tasks=5, lasting=10, by="classes", known=False)`.

    A client's `train` has what came with the current task, and nothing else; its `validation` and `test`, and the
    global test, have what came with all tasks so far. The current task is that of the round: `at(round)`.

    Where classes come (by `classes` or `missions`), `known` says whether the task of a sample is told with it: then it
    is learned and judged among the classes that came with its own; otherwise among all classes that have come to
    anybody so far, by one softmax. In a `drift` the mixtures' ends are drawn from Dirichlet(`alpha`), and the global
    test is all there from the start; when `samples` come nothing changes in what is judged.

    Raises UsageError for values that do not fit, and for a problem that has no single label a sample.
    """

    by: str = "classes"
    known: bool | None = None  # None: where classes come, yes
    alpha: float | None = None  # None: in a drift 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        _fitting("a stream", self.by, self.known, self.alpha)
        if {"stream", "partial"} & self.inner.offers:
            raise UsageError("a stream lies upon a problem itself; what else there is lies upon the stream")
        if self.by != "samples" and (not self.classes or type(self.inner).loss is not Task.loss):
            raise UsageError(
                f"a stream by={self.by} deals samples by their class, of which {type(self.inner).__name__} has not one "
                "each; take by=samples"
            )
        groups = isinstance(self.plan, ByClass)
        if self.tasks < 1 or self.lasting < 1 or (groups and self.tasks > self.classes):
            by_class = f"1 to {self.classes} tasks (of at least one class each)"
            raise UsageError(
                f"a stream has {self.tasks} tasks of {self.lasting} rounds; expected "
                f"{by_class if groups else 'at least one task'}, and at least one round"
            )

        if groups and self.told and self.tasks > 1 and (alone := int((self.classes_of.sum(1) == 1).sum())):
            raise UsageError(
                f"a stream of {self.tasks} tasks over {self.classes} classes has {alone} with one class each, in which "
                "there is nothing to learn where a sample's task is told; take fewer tasks, or known=false"
            )

    @cached_property
    def plan(self) -> Plan:
        """When samples come."""
        there = (self.tasks, self.classes, self.population, self.population + self.newcomers, self.seed)
        return PLANS[self.by](*there) if self.alpha is None else Drift(*there, self.alpha)

    def at(self, round: int) -> Self:
        moved = super().at(round)
        if moved is not self:
            vars(moved)["plan"] = self.plan  # which takes a while for a million clients, and is the same in every round
        return moved

    @property
    def told(self) -> bool:
        """Whether the task of a sample is told."""
        return self.known is not False

    @cached_property
    def seen(self) -> Tensor:
        """Which classes have come to anybody so far, bool [C]."""
        return self._come(self.now)

    @cached_property
    def old(self) -> Tensor:
        """Which of them have come before the current task, bool [C]."""
        return self._come(self.now - 1)

    @property
    def new(self) -> Tensor:
        """Which classes came with the current task, bool [C]."""
        return self.seen & ~self.old

    def _come(self, task: int) -> Tensor:
        plan = self.plan
        return plan.first <= task if isinstance(plan, ByClass) else torch.full((self.classes,), task >= 0)

    @cached_property
    def classes_of(self) -> Tensor:
        """The classes of each group, bool [tasks, C]; all of them where they do not come in groups."""
        if not isinstance(self.plan, ByClass):
            return torch.ones(self.tasks, self.classes, dtype=torch.bool)
        return self.plan.group == torch.arange(self.tasks)[:, None]

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {f"stream:by={self.by}"}

    def stage(self, round: int) -> int | None:
        return self.inner.stage(round) if self.by == "samples" else super().stage(round)

    @cached_property
    def _dealt(self) -> dict[tuple[int, str], Dated]:
        return {}  # what was asked for: clients ask for their data again and again

    def data(self, client: int, split: str) -> Data:
        if (client, split) not in self._dealt:
            whole = self.inner.data(client, split)
            dated = Dated.of_data(whole, self.plan.comes(client, split, whole.y))
            self._dealt[client, split] = self._kept(dated, split == "train")
        return self._dealt[client, split]

    def present(self, client: int) -> bool:
        return len(self.data(client, "train")) > 0

    def global_test(self) -> Data:
        whole = self.inner.global_test()
        dated = Dated.of_data(whole, self.plan.comes_to_all(whole.y))
        if not isinstance(self.plan, ByClass):
            return whole
        kept = self._kept(dated, False)  # which task a class has is, in missions, another at every client
        return kept if self.by == "classes" else Data(kept.inputs, kept.labels, kept.rows)

    def _kept(self, data: Dated, only_now: bool) -> Dated:
        return data.when(lambda task: task == self.now if only_now else task <= self.now)

    def within(self, scores: Tensor, labels: Tensor) -> Tensor:
        if not isinstance(self.plan, ByClass):
            return scores
        if self.told:
            groups = self.plan.group.to(scores.device, non_blocking=True)
            among = groups == groups[labels][:, None]
        else:
            own = torch.arange(self.classes, device=scores.device) == labels[:, None]
            # An attacker's label may be of a class that has not come.
            among = self.seen.to(scores.device, non_blocking=True) | own
        return scores.masked_fill(~among, NEVER)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        if self.by == "samples":
            return self.inner.criterion(outputs, batch)
        return self.inner.criterion(self.within(outputs, batch.y), batch)

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return self.inner.loss(net, batch) if self.by == "samples" else Task.loss(self, net, batch)

    def head_loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return self.inner.head_loss(net, batch) if self.by == "samples" else Task.head_loss(self, net, batch)

    def judge(self, scores: Any, data: Data) -> dict[str, float]:
        return self.inner.judge(scores, data) if self.by == "samples" else super().judge(scores, data)

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        groups = [mask.nonzero().flatten().tolist() for mask in self.classes_of]
        by = {"by": self.by} | ({"known": self.told} if isinstance(self.plan, ByClass) else {})
        return told | {"tasks": groups, "rounds_per_task": self.lasting, "stream": by}


def _fitting(where: str, by: str, known: bool | None, alpha: float | None) -> None:
    """Raises UsageError for values of a stream that make no sense, whatever the problem is."""
    if by not in PLANS:
        raise unknown("kind of stream", by, PLANS)
    if known is not None and by not in TASKS_TOLD:
        raise UsageError(
            f"{where} has known={str(known).lower()}, and by={by} all classes are there from the start: there is no "
            "task that a sample could tell; leave it out, or take by=classes or by=missions"
        )
    if alpha is not None and (by != "drift" or alpha <= 0):
        raise UsageError(f"{where} has alpha={alpha}; it is a number above 0, and of a stream by=drift alone")


@layer(rank=0)
def build(
    spec: Spec,
    inner: Callable[[], Task],
    tasks: int = 5,
    rounds: int = 10,
    by: str = "classes",
    known: bool | None = None,
    alpha: float | None = None,
) -> Stream:
    """A problem as a stream: `stream:5,rounds=10,known=false` is five tasks of ten rounds each, and one softmax.

    `by`: classes, missions, drift (with `alpha`) or samples.
    """
    where = f"problem {spec.problem!r}"
    _fitting(where, by, known, alpha)
    made = Stream(inner(), tasks, rounds, by=by, known=known, alpha=alpha, seed=spec.seed)
    if spec.rounds <= (tasks - 1) * rounds:
        raise UsageError(
            f"{where} has {tasks} tasks of {rounds} rounds, but rounds is {spec.rounds}, in which not "
            f"all of them come; set rounds={tasks * rounds}, or stream:{tasks},rounds={max(1, spec.rounds // tasks)}"
        )
    return made


@dataclass(frozen=True, eq=False)
class StreamToy(Streamed):
    """A toy's clouds of points; from the third round on, as a second task, the same with their inputs turned round."""

    inner: Toy
    tasks: int = 2
    lasting: int = 2

    goal = ("accuracy", 0.6)  # the network is small for two tasks

    @cached_property
    def storage(self) -> tuple[Tensor, Tensor]:
        """The inputs and labels of both tasks, one after the other."""
        x, y = self.inner.x, self.inner.y
        return torch.cat([x, x.flip(1)]), torch.cat([y, y])

    def data(self, client: int, split: str) -> Data:
        now = range(self.now, self.now + 1) if split == "train" else range(self.now + 1)
        return self._in(self.inner.data(client, split), now)

    def global_test(self) -> Data:
        return self._in(self.inner.global_test(), range(self.now + 1))

    def public(self) -> Data:
        return self._in(self.inner.public(), range(1))

    def _in(self, first: Data, tasks: range) -> Dated:
        """Samples of the first task as they are in some tasks."""
        x, y = self.storage
        rows = first.taken(None)
        of = torch.tensor(tasks, device=rows.device).repeat_interleave(len(rows))
        return Dated(x, y, rows.repeat(len(tasks)) + of * (len(y) // 2), tasks=of)


@dataclass(frozen=True, eq=False)
class SixClouds(Over):
    """A toy's three clouds, and the same with their inputs turned round as three classes more."""

    inner: Toy

    goal = ("accuracy", 0.5)  # two rounds are few for a first task
    loss, head_loss = Task.loss, Task.head_loss

    @property
    def classes(self) -> int:  # type: ignore[override]
        return 2 * self.inner.classes

    def network(self) -> nn.Module:
        return self._wider(self.inner.network())

    def build(self, model: str) -> nn.Module:
        return self._wider(self.inner.build(model))

    def _wider(self, net: nn.Module) -> nn.Module:
        head = net.get_submodule("head")
        assert isinstance(head, nn.Linear)
        net.add_module("head", nn.Linear(head.in_features, self.classes))
        return net

    @cached_property
    def storage(self) -> tuple[Tensor, Tensor]:
        """The inputs and labels of all six."""
        x, y = self.inner.x, self.inner.y
        return torch.cat([x, x.flip(1)]), torch.cat([y, y + self.inner.classes])

    def data(self, client: int, split: str) -> Data:
        return self._both(self.inner.data(client, split))

    def global_test(self) -> Data:
        return self._both(self.inner.global_test())

    def public(self) -> Data:
        return self._both(self.inner.public())

    def _both(self, three: Data) -> Data:
        x, y = self.storage
        rows = three.taken(None)
        return Data(x, y, torch.cat([rows, rows + len(y) // 2]))


def toy(inner: Toy | None = None, by: str = "", **shape: Any) -> Streamed:
    """A small one, for the contract of methods: upon a toy of another kind, or a plain one for clients of `sizes`."""
    inner = inner or Toy(**shape)
    return Stream(SixClouds(inner), 2, 2, by=by, known=False if by in TASKS_TOLD else None) if by else StreamToy(inner)
