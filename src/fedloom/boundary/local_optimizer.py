"""What makes the steps of clients' descents in place of plain SGD: `optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.boundary.stage import Stage
from fedloom.errors import UsageError
from fedloom.optimizers import Optimizer, optimizer

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call, Fields
    from fedloom.node import Client
    from fedloom.task import Task


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
        reply = inner()
        client.site.note_change(self, self.setting, client.uses[self.setting] > 0)
        return reply

    def on(self, task: Task) -> LocalOptimizer:
        return self

    def after_rehearsal(self, books: Books, whole: bool) -> LocalOptimizer:
        if whole and not books.site.changes.get((id(self), self.setting)):
            raise UsageError(
                f"optimizer={self.text} makes steps of client.descend, and the clients of {self.method} take none "
                "by it: they step on gradients in the open, or not at all; leave it out, or take a method that descends"
            )
        return self
