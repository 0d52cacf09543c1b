"""What makes replies of clients with different data alike before a rule compares them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.aggregators.rule import Context, Verdict, Wrapper
from fedloom.aggregators.stacked import blocks, squared_distances
from fedloom.errors import UsageError


@dataclass(frozen=True)
class Mixing(Wrapper):
    """Gives the rule behind it mixtures of the replies; a reply weighs what its mixtures weigh."""

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        among = context.among or len(stack)
        mix = self.mixture(stack, context)
        mixed = stack.new_empty(len(mix), stack.shape[1])
        for block in blocks(stack):
            mixed[:, block] = (mix @ stack[:, block].double()).to(stack.dtype)
        weights = None if context.weights is None else mix @ context.weights.double()
        value, weight = self.inner(mixed, replace(context, weights=weights, among=among))
        return Verdict(value, None if weight is None else mix.t() @ weight.double())

    @abstractmethod
    def mixture(self, stack: Tensor, context: Context) -> Tensor:
        """How much of each row goes into each mixture: double [B, K], whose rows sum to 1."""


@dataclass(frozen=True)
class Bucketing(Mixing):
    """The means of random buckets of s replies.

    Karimireddy, He, Jaggi: Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, ICLR 2022,
    arXiv 2006.09365 (Algorithm 1). A malicious reply spoils one bucket, so that the rule's f stays what it was.
    """

    s: int = 2  # s: replies in a bucket; the paper's experiments take 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s < 1:
            raise UsageError(f"bucketing:s is {self.s}; it must be at least 1")

    def check(self, count: int, among: int | None = None) -> int:
        return self.inner.check(-(-count // self.s), among or count)

    def mixture(self, stack: Tensor, context: Context) -> Tensor:
        count = len(stack)
        order = torch.randperm(count, generator=context.generator).to(stack.device)
        mix = torch.zeros(-(-count // self.s), count, dtype=torch.float64, device=stack.device)
        mix[torch.arange(count, device=stack.device) // self.s, order] = 1
        return mix / mix.sum(1, keepdim=True)


@dataclass(frozen=True)
class Nnm(Mixing):
    """Nearest-neighbour mixing: in place of every reply the mean of the K - f nearest to it, itself included.

    Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan: Fixing by Mixing: A Recipe for Optimal Byzantine ML under
    Heterogeneity, AISTATS 2023, arXiv 2302.01772 (Algorithm 2).
    """

    f: float | None = None  # f: malicious replies, or below 1 their share; null is the f of the rule behind it

    needs = (2, 1)

    def check(self, count: int, among: int | None = None) -> int:
        self.inner.check(count, among)
        return super().check(count, among)

    def mixture(self, stack: Tensor, context: Context) -> Tensor:
        near = len(stack) - super().check(len(stack), context.among)
        distances = squared_distances(stack).fill_diagonal_(-1)  # its own first, also among equals
        mix = torch.zeros_like(distances)
        mix.scatter_(1, distances.argsort(dim=1, stable=True)[:, :near], 1 / near)
        return mix
