"""How often clients come, learned from nothing but who came: mean intervals between two participations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Intervals:
    """FedAU's estimator [Wang, Ji 2024, arXiv 2306.03401]: `mean` [N] estimates one over each participation rate.

    `last` [N] is the round that closed the latest interval, `closed` [N] how many there are. An interval closes when
    its client comes, or when it is `cutoff` rounds long (0: only when it comes). Until the first, the mean is 1.
    """

    last: Tensor
    closed: Tensor
    mean: Tensor

    @staticmethod
    def none(population: int) -> Intervals:
        """Before the first round."""
        zeros = torch.zeros(population, dtype=torch.int64)
        return Intervals(zeros, zeros, torch.ones(population, dtype=torch.float64))

    def after(self, round: int, present: Iterable[int], cutoff: int) -> Intervals:
        """With who came in a round. Rounds that were left out count as rounds in which nobody came."""
        came = torch.zeros_like(self.last, dtype=torch.bool)
        came[list(present)] = True
        now = self
        while cutoff and bool((long := round - now.last > cutoff).any()):
            now = now._closing(long, now.last + cutoff)
        ending = came | (round - now.last == cutoff) if cutoff else came
        return now._closing(ending, torch.full_like(self.last, round))

    def _closing(self, which: Tensor, moment: Tensor) -> Intervals:
        mean = (self.closed * self.mean + (moment - self.last)) / (self.closed + 1)
        return Intervals(
            torch.where(which, moment, self.last),
            self.closed + which,
            torch.where(which, mean, self.mean),
        )

    def value(self) -> list[Tensor]:
        """As a message: `Intervals(*value)`."""
        return [self.last, self.closed, self.mean]
