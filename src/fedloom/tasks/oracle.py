"""Partly labelled data, whose other labels can be asked for, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from fedloom.errors import UsageError
from fedloom.task import Data, Task
from fedloom.tasks import layer
from fedloom.tasks.partial import Partial, parted, sharing
from fedloom.tasks.toy import Toy

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec


@dataclass(frozen=True, eq=False)
class Oracle(Partial):
    """A problem where a client begins with a share of its labels, and may ask an oracle for the others.

    `budget` labels may be asked for in the whole run (None: all). It is dealt out to the clients beforehand, by the
    sizes of their pools, so that it holds whoever asks first, and whatever becomes of replies.
    """

    budget: int | None = None

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"oracle"}

    def pool(self, client: int) -> Data:
        return parted(self.inner.data(client, "train"), "pool", self.share, self.seed, client)

    def allowance(self, client: int) -> int:
        if client >= self.population:
            return 0  # a newcomer asks nobody
        return len(self.pool(client)) if self.budget is None else self.allowances[client]

    @cached_property
    def allowances(self) -> list[int]:
        """The budget's parts, by client."""
        assert self.budget is not None
        return dealt(self.budget, [len(self.pool(k)) for k in range(self.population)])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"budget": self.budget}


def dealt(budget: int, pools: Sequence[int]) -> list[int]:
    """Whole parts of a budget by the sizes of pools, as near to their proportions as can be: the greatest rests first.

    They add up to the budget, or to all there is.
    """
    total = sum(pools)
    if budget >= total:
        return list(pools)
    parts = [budget * size // total for size in pools]
    rests = torch.tensor([budget * size % total for size in pools])
    for client in rests.argsort(descending=True, stable=True)[: budget - sum(parts)].tolist():
        parts[client] += 1
    return parts


@layer(rank=2)
def build(spec: Spec, inner: Callable[[], Task], share: float = 0.1, budget: int | None = None) -> Oracle:
    """A problem of which a share is labelled at first, and the rest can be asked for: `oracle:0.1,budget=500`."""
    where = f"problem {spec.problem!r}"
    sharing(share, where)
    made = Oracle(inner(), share, spec.seed, budget)
    for other, why in CLASHES.items():
        if other in made.inner.offers:
            raise UsageError(f"{where}: an oracle does not lie upon {other}, {why}; leave one of them out")
    there = sum(len(made.pool(k)) for k in range(made.population))
    if budget is not None and not 0 <= budget <= there:
        raise UsageError(
            f"{where}: a budget of {budget} labels; there are {there} to ask for; give a number from 0 to that, or "
            "leave it out"
        )
    return made


CLASHES = {
    "partial": "which says already what has a label",
    "stream": "where what comes later has no part of the budget yet",
}


def toy(inner: Toy | None = None, **shape: Any) -> Oracle:
    """A small one, for the contract of methods, half of whose samples have a label, and 30 more can be asked for."""
    return Oracle(inner or Toy(**shape), 0.5, budget=30)
