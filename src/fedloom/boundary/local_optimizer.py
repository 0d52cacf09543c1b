"""What makes the steps of clients' descents in place of plain SGD: `optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedloom.boundary.stage import Stage
from fedloom.errors import UsageError
from fedloom.optimizers import Again, Optimizer, Rate, Tensors, optimizer

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call, Fields, Outcome
    from fedloom.node import Client
    from fedloom.task import Task


@dataclass(frozen=True)
class Noting(Optimizer):
    """An optimizer that notes each descent that it begins."""

    inner: Optimizer
    begun: list[int] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        """Its options are the inner one's."""

    @property
    def clients_apart(self) -> bool:  # type: ignore[override]
        return self.inner.clients_apart

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        return self.inner.looks_back

    def start(self, at: Tensors) -> list[Tensor]:
        self.begun.append(len(at))
        return self.inner.start(at)

    def step(self, at: Tensors, d: Tensors, rate: Rate, memory: list[Tensor], again: Again | None) -> None:
        self.inner.step(at, d, rate, memory, again)


@dataclass(frozen=True)
class LocalOptimizer(Stage):
    """Every descent of a client that names no optimizer of its own takes its steps by this one."""

    text: str
    optimizer: Optimizer
    method: str

    setting = "optimizer"
    kinds = frozenset({"setup", "train", "finish"})

    @staticmethod
    def of(text: str, method: str, dp: str | None) -> LocalOptimizer:
        """The optimizer that a text asks for; raises UsageError with what is wrong in it."""
        made = LocalOptimizer(text, optimizer(text), method)
        if made.optimizer.looks_back and dp and dp.startswith("sample"):
            raise UsageError(
                f"optimizer={text} and dp={dp}: it takes a second gradient of every batch, and one is accounted for"
            )
        return made

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
        client.optimizer = self.optimizer
        return inner()

    def on(self, task: Task) -> LocalOptimizer:
        return replace(self, optimizer=Noting(self.optimizer))

    def reply_seen(self, books: Books, call: Call, outcome: Outcome) -> None:
        if isinstance(self.optimizer, Noting) and self.optimizer.begun:
            books.memory[self.setting] = {"descents": len(self.optimizer.begun)}

    def after_rehearsal(self, books: Books, whole: bool) -> LocalOptimizer:
        if whole and self.setting not in books.memory:
            raise UsageError(
                f"optimizer={self.text} makes steps of client.descend, and the clients of {self.method} take none "
                "by it: they step on gradients in the open, or not at all; leave it out, or take a method that descends"
            )
        return self
