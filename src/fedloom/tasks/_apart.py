"""A problem as each side of a network has it: the server without its clients' data, a client with its own alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from fedloom.errors import UsageError
from fedloom.task import SPLITS, Data, Task
from fedloom.tasks._over import Over

OWN = "own"  # how rows are dealt that clients brought themselves


def registration(task: Task, client: int) -> dict[str, Any]:
    """What a client tells of its data once, before anything else: `info`, and how many `rows` each split has."""
    return {"info": dict(task.info(client)), "rows": {split: task.rows_of(client, split) for split in SPLITS}}


def checked(told: Any) -> dict[str, Any]:
    """What a client has registered, if it is what `registration` gives; raises ValueError for anything else."""
    if not isinstance(told, Mapping) or not isinstance(told.get("info"), Mapping):
        raise ValueError(f"a registration is a dict with info and rows, not {str(told)[:80]}")
    rows, info = told.get("rows"), told["info"]
    if not isinstance(rows, Mapping) or {*rows} != {*SPLITS} or not all(map(_is_count, rows.values())):
        raise ValueError(f"a registration has the rows of {', '.join(SPLITS)} as whole numbers, not {str(rows)[:80]}")
    if "n" in info and not _is_count(info["n"]):
        raise ValueError(f"a client registers a whole number of samples n, not {str(info['n'])[:80]}")
    for name, value in info.items():
        if not isinstance(value, int | float | str) or value != value or value in (math.inf, -math.inf):
            raise ValueError(f"a client registers numbers and words, and {str(name)[:40]} is {str(value)[:80]}")
    return dict(told)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


@dataclass(frozen=True, eq=False)
class AtServer(Over):
    """The problem at the server: of clients it knows what they registered, and asking for their data is an error.

    `registered` has, by client, what `registration` gave; who has not come yet counts as one without rows.
    """

    registered: Mapping[int, Mapping[str, Any]]

    def data(self, client: int, split: str) -> Data:
        raise UsageError(f"the {split} data of client {client} stay with it, and the server asked for them")

    def pool(self, client: int) -> Data | None:
        raise UsageError(f"the samples of client {client} without labels stay with it, and the server asked for them")

    @property
    def has_oracle(self) -> bool:
        return self.inner.has_oracle

    def rows_of(self, client: int, split: str) -> int:
        told = self.registered.get(client)
        return told["rows"][split] if told else 0

    def info(self, client: int) -> Mapping[str, Any]:
        told = self.registered.get(client)
        return told["info"] if told else {"n": 0}

    def present(self, client: int) -> bool:
        return client in self.registered and Task.present(self, client)

    def describe(self) -> dict[str, Any]:
        told = self.inner.describe()
        return told | Task.describe(self) | {"apart": self._apart(told)}

    def _apart(self, told: Mapping[str, Any]) -> list[str]:
        """What is to be known of rows that the server does not know, in sentences."""
        if told.get("partition") == OWN:
            return list(told["decisions"])
        if all(self.rows_of(k, split) == self.inner.rows_of(k, split) for k in self.registered for split in SPLITS):
            return []
        return [
            "Clients have rows of their own: columns, classes and scales are those of the server's rows, on which "
            "nothing trains, and whose test rows are the global test."
        ]


@dataclass(frozen=True, eq=False)
class AtClient(Over):
    """The problem at one client: its own data, and what every client has; anybody else's is an error."""

    client: int

    def data(self, client: int, split: str) -> Data:
        self._own(client, f"{split} data")
        return self.inner.data(client, split)

    def pool(self, client: int) -> Data | None:
        self._own(client, "samples without labels")
        return self.inner.pool(client)

    def allowance(self, client: int) -> int:
        self._own(client, "allowance of labels")
        return self.inner.allowance(client)

    def info(self, client: int) -> Mapping[str, Any]:
        self._own(client, "registration")
        return self.inner.info(client)

    def present(self, client: int) -> bool:
        self._own(client, "presence")
        return self.inner.present(client)

    def public(self) -> Data | None:
        self._not_here("public data of the server")

    def global_test(self) -> Data:
        self._not_here("global test set")

    def global_tests(self) -> Mapping[str, Data]:
        self._not_here("global test sets")

    def global_validation(self) -> Data | None:
        self._not_here("validation data of the server")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.blank().shape[1:])

    def blank(self) -> Tensor:
        inputs = self.inner.data(self.client, "train").inputs
        return inputs.new_zeros(1, *inputs.shape[1:])

    def _own(self, client: int, what: str) -> None:
        if client != self.client:
            raise UsageError(f"client {self.client} asked for the {what} of client {client}, which are not here")

    def _not_here(self, what: str) -> NoReturn:
        raise UsageError(f"client {self.client} asked for the {what}, which are not here")


@dataclass(frozen=True, eq=False)
class Brought(Over):
    """A server's problem, in which clients have rows of their own: `parts` are, by client, what each made of them."""

    parts: Mapping[int, Task]

    at = Task.at  # type: ignore[assignment]
    loss, head_loss, present = Task.loss, Task.head_loss, Task.present

    def data(self, client: int, split: str) -> Data:
        return self.parts.get(client, self.inner).data(client, split)

    def info(self, client: int) -> Mapping[str, Any]:
        return self.parts.get(client, self.inner).info(client)

    def to(self, device: torch.device) -> Self:
        parts = {client: part.to(device) for client, part in self.parts.items()}
        return replace(self, inner=self.inner.to(device), parts=parts)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe() | Task.describe(self)
