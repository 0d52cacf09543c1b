"""Rules that judge every coordinate by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedloom.aggregators.rule import Context, Rule, Verdict
from fedloom.aggregators.stacked import average, columnwise, middle


@dataclass(frozen=True)
class Median(Rule):
    """The median of every coordinate; of an even number of replies, the mean of the two in the middle.

    Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning, ICML 2018, arXiv 1803.01498 (definition 1).
    """

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        return Verdict(columnwise(stack, middle))


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """The mean of every coordinate without its f greatest and its f smallest values.

    Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning, ICML 2018, arXiv 1803.01498 (definition 2).
    """

    f: float = 0.2  # beta: how many values go at each end, or below 1 the share of them

    needs: ClassVar = (2, 1)

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        f = self.check(len(stack), context.among)
        if f == 0:
            return Verdict(average(stack))
        return Verdict(columnwise(stack, lambda ordered: ordered[:, f:-f].double().mean(1)))
