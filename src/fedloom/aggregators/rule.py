"""What a rule is: it makes one row of many, and may say how much of it came from whom."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedloom.aggregators.stacked import average, columnwise, middle, shares
from fedloom.errors import UsageError
from fedloom.ranges import settle


class Piece(NamedTuple):
    """One tensor of every row: `columns` of it, in the order of its `shape`; of a vector with four axes, channels last.

    `origin` says what stands there: `model` a tensor of a model whose last value, before the clients trained, is at the
    same columns of `Context.sent`; `difference` how far it has moved since. None: something else, or nobody knows.
    """

    field: str  # of the reply, with the place in it where it is a container: `delta`, `heads.0`
    tensor: str  # its name in a vector's layout; of a plain tensor or number, nothing
    shape: tuple[int, ...]
    columns: slice
    origin: Literal["model", "difference"] | None = None


@dataclass
class Context:
    """What a rule may know besides the replies.

    `weights` [K] are what the replies claim to weigh (numbers of samples); rules that a lie must not move leave them
    aside. `pieces` say which columns are which tensor of which field, in their order and without a gap; `sent` [D] is
    what all clients were sent and their models began from, zero where a piece has no origin. `trusted` [D] is the reply
    that the server computed on its own data. `memory` is what the rule keeps from round to round: tensors by name, so
    that a checkpoint can hold it. `among` is set where the rows are mixtures of replies: of so many.
    """

    weights: Tensor | None = None
    pieces: tuple[Piece, ...] = ()
    sent: Tensor | None = None
    trusted: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None
    among: int | None = None


class Verdict(NamedTuple):
    """The aggregate `value` [D], and the `weight` [K] of each reply in it where the rule chooses or weighs whole ones.

    Zero is a reply that was turned away. Where every coordinate is judged by itself, `weight` is None.
    """

    value: Tensor
    weight: Tensor | None = None


def apply(rule: Rule, stack: Tensor, context: Context, learned: Tensor) -> Verdict:
    """A rule's verdict on the columns that are `learned` (bool [D]); the others, running statistics, follow it.

    Their scale is that of the data, and would decide every distance and length. They get the mean by the verdict's
    weights or, where coordinates are judged one by one, the median: either way a variance stays one.
    Of the context, `pieces` are those of the learned columns alone; its rows are whole.
    """
    if learned.all() or not learned.any():
        return rule(stack, context)
    context = replace(
        context,
        trusted=None if context.trusted is None else context.trusted[learned],
        sent=None if context.sent is None else context.sent[learned],
    )
    verdict = rule(stack[:, learned], context)
    rest = stack[:, ~learned]
    chosen = verdict.weight is not None and bool(verdict.weight.sum() > 0)
    value = stack.new_empty(stack.shape[1])
    value[learned] = verdict.value
    value[~learned] = average(rest, shares(rest, verdict.weight)) if chosen else columnwise(rest, middle)
    return Verdict(value, verdict.weight)


@dataclass(frozen=True)
class Rule(ABC):
    """Rows `stack` [K, D], one a reply, to one row [D]. Fields are options, as in `krum:f=4`.

    `f` says everywhere how many replies may be malicious: a whole number, or below 1 a share of the replies.
    """

    needs: ClassVar[tuple[int, int]] = (0, 1)  # (a, b): it takes at least a f + b rows
    needs_trusted: ClassVar[bool] = False  # it compares with a reply that the server computes on data of its own
    needs_models: ClassVar[bool] = False  # it reads which columns are a model's (`context.pieces`), and what was sent
    remembers: ClassVar[bool] = False  # it keeps something in `context.memory`

    def __post_init__(self) -> None:
        settle(self, self.name(), besides="inner")
        value = getattr(self, "f", None)
        if isinstance(value, float) and value >= 1 and not value.is_integer():
            raise UsageError(f"{self.name()}:f is {value}; it is a number of replies, or below 1 a share of them")

    @classmethod
    def name(cls) -> str:
        """The name on the command line: that of the class, in small letters."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    @abstractmethod
    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        """The aggregate of the rows [K, D]. Raises UsageError if they are too few."""

    @property
    def counts(self) -> bool:
        """Whether it has an f, a number of malicious replies that it allows for."""
        return getattr(self, "f", None) is not None

    def malicious(self, count: int) -> int:
        """How many of `count` replies `f` stands for."""
        f: float = getattr(self, "f", 0)
        return int(f) if f >= 1 else math.floor(f * count + 1e-9)  # 0.29 * 100 is a little less than 29

    def check(self, count: int, among: int | None = None) -> int:
        """f for `count` rows made of `among` replies (None: they are the replies); UsageError if the rows are too few.

        Before a run it tells whether a cohort of that size will do.
        """
        f = self.malicious(among or count)
        factor, more = self.needs
        least = factor * f + more
        if count < least:
            made = f"{count}" if among in (None, count) else f"{count} (made of {among} replies)"
            raise UsageError(
                f"{self.name()} with f={f} needs at least {factor}f + {more} = {least} replies and has {made}; "
                f"take a smaller f, or ask more clients"
            )
        return f


@dataclass(frozen=True)
class Wrapper(Rule):
    """A rule around the one written after it: `nnm+krum:f=4`. Without an `f` of its own it takes the other's."""

    inner: Rule

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "f", 0) is None and not self.inner.counts:
            raise UsageError(f"{self.name()} needs its f, for {self.inner.name()} has none: {self.name()}:f=4+...")

    @property
    def counts(self) -> bool:
        return super().counts or self.inner.counts

    @property
    def needs_trusted(self) -> bool:  # type: ignore[override]
        return self.inner.needs_trusted

    @property
    def needs_models(self) -> bool:  # type: ignore[override]
        return self.inner.needs_models

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.inner.remembers

    def malicious(self, count: int) -> int:
        own: float | None = getattr(self, "f", None)
        return self.inner.malicious(count) if own is None else super().malicious(count)
