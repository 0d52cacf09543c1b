"""Which numbers a field takes, and where a search looks for better ones: said beside the field's type.

batch: int = 10                              at least 0, as every number of which nothing else is said
epochs: Positive[int] = 1                    greater than 0
shift: Signed[float] = 0.0                   any number
mu: Annotated[float, Log(1e-3, 1.0)] = 0.01  at least 0; searched from 1e-3 to 1 on a log scale
lr: LearningRate = 0.05                      greater than 0; searched as learning rates are
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar

from fedloom.errors import UsageError
from fedloom.fields import coerced

N = TypeVar("N")


@dataclass(frozen=True)
class Range:
    """The numbers from `low` on; `above` leaves out `low` itself."""

    low: float
    above: bool = False

    def __str__(self) -> str:
        return f"{'greater than' if self.above else 'at least'} {self.low:g}"

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the range; what is no number does."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return value > self.low or (value == self.low and not self.above)


@dataclass(frozen=True)
class Search:
    """Where a search looks for a field's value: (low, high, "log" or "linear"), or the choices."""

    where: tuple[Any, ...]


class Log(Search):
    """From `low`, above 0, to `high`, on a log scale. Whole numbers are given as such."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__((low, high, "log"))


class Linear(Search):
    """From `low` to `high`, evenly. Whole numbers are given as such."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__((low, high, "linear"))


class Among(Search):
    """One of some values."""

    def __init__(self, *choices: Any) -> None:
        super().__init__(choices)


PLAIN = Range(0)  # of a number whose annotation says nothing of its range
Positive = Annotated[N, Range(0, above=True)]
Signed = Annotated[N, Range(-math.inf)]
LearningRate = Annotated[Positive[float], Log(1e-3, 1.0)]


class Hint(NamedTuple):
    """What a field's annotation says: the type, the range of its numbers, and where a search looks, if one does."""

    type: Any
    range: Range
    search: tuple[Any, ...] | None


def hints_of(cls: type) -> dict[str, Hint]:
    """What the annotations of a dataclass's fields say, by name, in their order.

    Raises:
        UsageError: a field has a range and no type, as in `lr: Positive`.
    """
    return _hints(cls)


@cache  # apart: to mypy, a class whose instances have no hash may be no argument of what is cached
def _hints(cls: type) -> dict[str, Hint]:
    plain, full = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        if isinstance(plain[field.name], TypeVar):
            raise UsageError(
                f"{cls.__name__}.{field.name} has a range without a type; write {field.name}: Positive[float], "
                "Positive[int], Signed[float] or Signed[int]"
            )
        marks = _marks(full[field.name])
        found[field.name] = Hint(
            plain[field.name],
            next((mark for mark in marks if isinstance(mark, Range)), PLAIN),
            next((mark.where for mark in marks if isinstance(mark, Search)), None),
        )
    return found


def settle(instance: Any, owner: str, besides: str = "") -> None:
    """Puts the fields of a frozen dataclass into their types; `besides` is one that is left as it is.

    Raises:
        UsageError: a value is of another type, or out of its range; `owner` says in errors whose field it is.
    """
    for name, hint in hints_of(type(instance)).items():
        if name != besides:
            said = f"{owner}:{name.rstrip('_')}"
            value = coerced(said, getattr(instance, name), hint.type)
            object.__setattr__(instance, name, value)
            if not hint.range.holds(value):
                raise UsageError(f"{said} is {value}; it must be {hint.range}")


def _marks(hint: Any) -> list[Any]:
    """What an annotation says beyond its type, also that of the members of a union."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return [*hint.__metadata__, *_marks(inner[0])]
    return [mark for one in inner for mark in _marks(one)] if origin in (typing.Union, types.UnionType) else []
