"""Gradient splitting."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.aggregators.rule import Context, Verdict, Wrapper
from fedloom.aggregators.stacked import average, first, norms, uniform
from fedloom.errors import UsageError


@dataclass(frozen=True)
class Gas(Wrapper):
    """Any rule on random pieces of the replies, only to score them: the plain mean of the K - f with the best scores.

    Liu, Chen, Lyu, Wu, Wu, Chen: Byzantine-Robust Learning on Heterogeneous Data via Gradient Splitting,
    ICML 2023, arXiv 2302.06079 (Algorithm 1). A reply's score is its distance from the rule's aggregate, summed over
    p pieces of the coordinates; the pieces are drawn anew every round.
    """

    p: int = 1000  # p: pieces; the official configuration's, tuned from 100 to 1,000,000 in the paper
    f: float | None = None  # f: malicious replies, or below 1 their share; null is the f of the rule behind it

    needs = (2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner.remembers:
            raise UsageError("gas draws new pieces every round, so that no rule behind it can remember the last one")
        if self.inner.needs_models:
            raise UsageError(f"gas scores random pieces of replies, and {self.inner.name()} whole tensors of models")
        if self.p < 1:
            raise UsageError(f"gas:p is {self.p}; it must be at least 1")

    def check(self, count: int, among: int | None = None) -> int:
        self.inner.check(count, among)
        return super().check(count, among)

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        f = self.check(len(stack), context.among)
        order = torch.randperm(stack.shape[1], generator=context.generator).to(stack.device)
        scores = torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
        for piece in order.tensor_split(min(self.p, max(stack.shape[1], 1))):
            part = stack[:, piece]
            trusted = None if context.trusted is None else context.trusted[piece]
            scores += norms(part, self.inner(part, replace(context, trusted=trusted)).value)
        weight = uniform(stack, first(scores.nan_to_num(nan=torch.inf), len(stack) - f))
        return Verdict(average(stack, weight), weight)
