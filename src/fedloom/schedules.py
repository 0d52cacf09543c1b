"""How the clients' learning rate changes over rounds: `schedule=cosine`, `exponential:0.99`, `warmup:5+step:30`.

A method's field `lr`, and that of methods that it wraps, is multiplied by a factor in each round, as if it had been set
so: whatever uses it, a step or an equation, sees the rate of the round.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from fedloom.errors import UsageError
from fedloom.members import Registry
from fedloom.parsing import bound, chain
from fedloom.ranges import Positive, settle


@dataclass(frozen=True)
class Schedule(ABC):
    """A factor on the learning rate in every round. Fields are its options."""

    by_rounds: ClassVar[bool] = False  # it depends on how many rounds the run has

    def __post_init__(self) -> None:
        settle(self, type(self).__name__.lower())

    @abstractmethod
    def factor(self, round: int, rounds: int) -> float:
        """What the learning rate is multiplied by in a round, numbered from 1, of so many."""


@dataclass(frozen=True)
class Exponential(Schedule):
    """`decay` to the power of the rounds that are over."""

    decay: Positive[float]

    def factor(self, round: int, rounds: int) -> float:
        return self.decay ** (round - 1)


@dataclass(frozen=True)
class Step(Schedule):
    """Times `decay` after every so many rounds (`every`)."""

    every: Positive[int]
    decay: Positive[float] = 0.1

    def factor(self, round: int, rounds: int) -> float:
        return self.decay ** ((round - 1) // self.every)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From 1 down to `end` on half a cosine; the round after the last would have `end`."""

    end: float = 0.0

    by_rounds = True

    def factor(self, round: int, rounds: int) -> float:
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * (round - 1) / rounds)) / 2


@dataclass(frozen=True)
class Linear(Schedule):
    """From 1 to `end` in equal steps; the last round has `end`."""

    end: Positive[float]

    by_rounds = True

    def factor(self, round: int, rounds: int) -> float:
        return 1 + (self.end - 1) * (round - 1) / max(1, rounds - 1)


@dataclass(frozen=True)
class Warmup(Schedule):
    """Up to 1 in equal steps, reached after so many `rounds`."""

    rounds: Positive[int]

    def factor(self, round: int, rounds: int) -> float:
        return min(1.0, round / self.rounds)


@dataclass(frozen=True)
class Product(Schedule):
    """Several schedules at once: the product of their factors."""

    parts: tuple[Schedule, ...]

    @property
    def by_rounds(self) -> bool:  # type: ignore[override]
        return any(part.by_rounds for part in self.parts)

    def __post_init__(self) -> None:
        """Its parts have been settled."""

    def factor(self, round: int, rounds: int) -> float:
        return math.prod(part.factor(round, rounds) for part in self.parts)


SCHEDULES: Registry[type[Schedule]] = Registry(
    "schedule",
    "fedloom.schedules",
    {"exponential": Exponential, "step": Step, "cosine": Cosine, "linear": Linear, "warmup": Warmup},
    Schedule,
)
ROUNDS = 10_000  # looked at to see whether a schedule changes anything


def schedule(text: str, rounds: int) -> Schedule:
    """A schedule from its text for a run of so many rounds; raises UsageError with what is wrong in it."""
    parts = []
    for term in chain(text):
        cls = SCHEDULES[term.name]
        options = bound(term, cls)
        try:
            parts.append(cls(**options))
        except TypeError:
            first = next(field.name for field in fields(cls) if field.name not in options)
            example = f", as in {term.name}:{EXAMPLES[first]}" if first in EXAMPLES else ""
            raise UsageError(f"schedule={text}: {term.name} needs {first}{example}") from None
    made = Product(tuple(parts))
    if all(made.factor(round, rounds) == 1 for round in range(1, min(rounds, ROUNDS) + 1)):
        raise UsageError(f"schedule={text} leaves the learning rate as it is in all of {rounds} rounds; leave it out")
    return made


EXAMPLES = {"decay": "0.99", "every": "30", "end": "0.1", "rounds": "5"}
