"""What one kind of attacker is: a share of the clients, its options, and what it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedloom.boundary.attack.numbers import Sent
from fedloom.calls import Fields
from fedloom.errors import UsageError
from fedloom.ranges import settle

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.node import Client
    from fedloom.task import Task

Inner = Callable[[], Fields]


@dataclass(frozen=True)
class Part:
    """One kind of attacker. Fields are options, as in `sign_flip:0.2,scale=3`; those in `hidden` are none."""

    share: float  # of the clients that are such, below 1; from 1 on their number

    hidden: ClassVar[frozenset[str]] = frozenset()
    sends_nan: ClassVar[bool] = False  # in place of numbers
    reverses: ClassVar[bool] = False  # it must know what updates begin from

    def __post_init__(self) -> None:
        settle(self, self.name())
        if self.share >= 1 and not self.share.is_integer():
            raise UsageError(f"{self.name()}:{self.share} is neither a share of the clients nor a number of them")

    @classmethod
    def name(cls) -> str:
        """The name on the command line: that of the class, in small letters."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    def count(self, population: int) -> int:
        """How many of `population` clients it stands for."""
        number = int(self.share) if self.share >= 1 else int(self.share * population + 0.5)
        if self.share and not number:
            raise UsageError(f"{self.name()}:{self.share} of {population} clients is nobody; take a greater share")
        return number

    def fit(self, task: Task) -> Part:
        """This part for a task; raises UsageError for one that it cannot attack, or where it would do nothing."""
        return self

    def act(self, client: Client, call: Call, sent: Sent, inner: Inner) -> Fields:
        """What leaves a malicious client; `inner` does its honest work."""
        return inner()
