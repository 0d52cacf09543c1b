"""The mean, with lengths as they are or bounded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedloom.aggregators.rule import Context, Rule, Verdict
from fedloom.aggregators.stacked import average, middle, norms, shares


@dataclass(frozen=True)
class Mean(Rule):
    """The mean with the weights that the replies claim: one malicious client moves it anywhere."""

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        weight = shares(stack, context.weights)
        return Verdict(average(stack, weight), weight)


@dataclass(frozen=True)
class NormBound(Rule):
    """The weighted mean after every reply longer than a bound was shortened to it.

    Sun, Kairouz, Suresh, McMahan: Can You Really Backdoor Federated Learning?, 2019, arXiv 1911.07963 (section 4). What
    a reply may do is bounded, not how many do it: a few malicious clients drag the mean, they cannot replace it.
    """

    bound: float | None = None  # M: the greatest length; null is the median of the round's lengths

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        lengths = norms(stack)
        bound = middle(lengths.sort().values[None]) if self.bound is None else self.bound
        weight = shares(stack, context.weights) * (bound / lengths).clamp(max=1).nan_to_num(nan=0.0)
        return Verdict(average(stack, weight), weight)
