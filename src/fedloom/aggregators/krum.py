"""Rules that choose replies with near neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.aggregators.rule import Context, Rule, Verdict
from fedloom.aggregators.stacked import average, columnwise, first, middle, squared_distances, uniform
from fedloom.errors import UsageError


@dataclass(frozen=True)
class Krum(Rule):
    """The reply whose nearest replies are nearest: the smallest sum of squared distances to its K - f - 2 neighbours.

    Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent,
    NeurIPS 2017, arXiv 1703.02757. With m > 1 the mean of the m best.
    """

    f: float = 0.2  # f: malicious replies, or below 1 their share
    m: int = 1  # m: how many of the best are averaged

    needs: ClassVar = (2, 3)

    def check(self, count: int, among: int | None = None) -> int:
        within("krum:m", self.m, count)
        return super().check(count, among)

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        return best(stack, self.check(len(stack), context.among), self.m)


@dataclass(frozen=True)
class MultiKrum(Rule):
    """The mean of the m replies that Krum scores best.

    Blanchard et al., NeurIPS 2017, arXiv 1703.02757 (section 4), which leaves m open; K - f is usual since.
    """

    f: float = 0.2  # f: malicious replies, or below 1 their share
    m: int | None = None  # m: how many of the best are averaged; null is K - f

    needs: ClassVar = (2, 3)

    def check(self, count: int, among: int | None = None) -> int:
        within("multi_krum:m", self.m, count)
        return super().check(count, among)

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        f = self.check(len(stack), context.among)
        return best(stack, f, len(stack) - f if self.m is None else self.m)


@dataclass(frozen=True)
class Bulyan(Rule):
    """Krum chooses K - 2f replies, one after the other; then every coordinate is the mean of those nearest its median.

    El Mhamdi, Guerraoui, Rouault: The Hidden Vulnerability of Distributed Learning in Byzantium, ICML 2018,
    arXiv 1802.07927 (section 4). Of the theta = K - 2f chosen, theta - 2f values are averaged in each coordinate.
    """

    f: float = 0.2  # f: malicious replies, or below 1 their share

    needs: ClassVar = (4, 3)

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        f = self.check(len(stack), context.among)
        distances = squared_distances(stack)
        left, chosen = list(range(len(stack))), []
        for _ in range(len(stack) - 2 * f):
            best = int(first(scores(distances[left][:, left], f), 1))
            chosen.append(left.pop(best))
        weight = uniform(stack, torch.tensor(sorted(chosen), device=stack.device))
        picked = stack[weight > 0] if f else stack
        return Verdict(columnwise(picked, lambda ordered: nearest_mean(ordered, 2 * f)), weight)


def within(option: str, m: int | None, count: int) -> None:
    """Raises UsageError if so many of `count` replies cannot be averaged."""
    if m is not None and not 1 <= m <= count:
        raise UsageError(f"{option} is {m}; of {count} replies it must be from 1 to {count}")


def best(stack: Tensor, f: int, m: int) -> Verdict:
    """The mean of the m rows that Krum scores best."""
    weight = uniform(stack, first(scores(squared_distances(stack), f), m))
    return Verdict(average(stack, weight), weight)


def scores(distances: Tensor, f: int) -> Tensor:
    """Krum's score of every row [K]: the sum of squared distances [K, K] to the K - f - 2 nearest others."""
    others = max(len(distances) - f - 2, 1)  # Bulyan comes down to fewer rows than Krum allows for
    return distances.sort(dim=1).values[:, 1 : 1 + others].sum(1)


def nearest_mean(ordered: Tensor, dropped: int) -> Tensor:
    """The mean [C] of the values of [C, K], ascending, nearest their median, with `dropped` of them left out."""
    ordered = ordered.double()
    kept = ordered.shape[1] - dropped
    # They lie side by side. One step to the right trades the leftmost for the next on the right; while that one is
    # nearer, it pays.
    pays = ordered[:, :dropped] + ordered[:, kept:] < 2 * middle(ordered)[:, None]
    start = pays.sum(1, keepdim=True)
    return ordered.gather(1, start + torch.arange(kept, device=ordered.device)).mean(1)
