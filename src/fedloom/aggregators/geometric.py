"""Rules that look for a centre of all replies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.aggregators.rule import Context, Rule, Verdict
from fedloom.aggregators.stacked import average, gram, middle, norms, shares, uniform


@dataclass(frozen=True)
class GeometricMedian(Rule):
    """The point with the smallest sum of distances to the replies (RFA), by Weiszfeld's smoothed iteration.

    Pillutla, Kakade, Harchaoui: Robust Aggregation for Federated Learning, IEEE TSP 2022, arXiv 1912.13445
    (Algorithm 2). The point is a mean of the replies with weights, so the iteration needs their inner products only,
    and goes on until the weights stand still; the paper, where a step costs a round of secure aggregation, stops after
    three.
    """

    nu: float = 1e-6  # nu: smoothing, the least distance that counts; the paper's
    steps: int = 1000  # R: at most so many steps
    weighted: bool = False  # alpha: the replies' claimed weights, as in the paper; a liar's claim counts then

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        alpha = shares(stack, context.weights) if self.weighted else uniform(stack)
        products, weight = gram(stack), alpha
        for _ in range(self.steps):
            pulled = products @ weight
            squares = products.diagonal() - 2 * pulled + weight @ pulled
            beta = alpha / squares.clamp(min=0).sqrt().clamp(min=max(self.nu, 1e-300))
            before, weight = weight, beta / beta.sum()
            # Relative: a weight of 1e-12 is not nothing if its reply is as long as 1e30.
            if (weight / before - 1).nan_to_num(nan=0.0).abs().max() < 1e-9:
                break
        return Verdict(average(stack, weight), weight)


@dataclass(frozen=True)
class CentredClip(Rule):
    """From the round before: its aggregate, plus the mean of the replies' differences from it, each clipped.

    Karimireddy, He, Jaggi: Learning from History for Byzantine Robust Optimization, ICML 2021, arXiv 2012.10333
    (Algorithm 2: v <- v + mean_i (x_i - v) min(1, tau / ||x_i - v||), L times). The centre is 0 before the first round.
    """

    tau: float | None = None  # tau: the clipping radius; null is the median of the distances from the centre
    steps: int = 1  # L: steps from the centre; the paper takes 1, and 3 or more for a bad start

    remembers: ClassVar = True

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        centre = context.memory.get("centre")
        if centre is None or centre.shape != stack.shape[1:]:
            centre = torch.zeros_like(stack[0])
        weight = uniform(stack)
        for _ in range(self.steps):
            distances = norms(stack, centre)
            tau = middle(distances.sort().values[None]) if self.tau is None else self.tau
            weight = uniform(stack) * (tau / distances).clamp(max=1).nan_to_num(nan=0.0)
            # v + sum_i w_i (x_i - v): what is clipped off stays with the centre.
            centre = average(stack, weight) + (1 - weight.sum()).to(stack.dtype) * centre
        context.memory["centre"] = centre.clone()
        return Verdict(centre, weight)
