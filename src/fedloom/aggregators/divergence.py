"""Rules that weigh models by how far, or where, they have gone: for data that differ, not against liars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom.aggregators.rule import Context, Piece, Rule, Verdict
from fedloom.aggregators.stacked import average, shares, uniform
from fedloom.errors import UsageError


@dataclass(frozen=True)
class Ida(Rule):
    """The mean with weights that go with the inverse distance of each model from the plain mean of all.

    Yeganeh, Farshad, Navab, Albarqouni: Inverse Distance Aggregation for Federated Learning with Non-IID Data, DART at
    MICCAI 2020, arXiv 2008.07665: alpha_k = r_k / sum_j r_j with r_k = (1 + eps) / (eps + ||mean - w_k||). All but one
    alike, that one weighs 1 / ((K - 1)^2 + 1): what an outlier does is reduced, not bounded.

    Departures: only tensors of models are measured, without running statistics, and what else clients send is averaged
    by the same weights; the paper's variant that weighs by training accuracies is left out, for no method sends any.
    """

    eps: float = 1e-8  # epsilon, so that equal models weigh the same; ours
    norm: Literal["l1", "l2"] = "l1"  # in which distances are measured; the paper's is l1
    weighted: bool = False  # alpha_k times the replies' claimed weights, as in IDA + FedAvg; a liar's claim counts

    needs_models: ClassVar = True

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        columns = torch.cat([torch.arange(p.columns.start, p.columns.stop) for p in of_models(self, context)])
        distances = torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
        for part in columns.to(stack.device).split(2**14):
            apart = stack[:, part].double()
            apart = apart - apart.mean(0)
            distances += apart.abs().sum(1) if self.norm == "l1" else apart.square().sum(1)
        if self.norm == "l2":
            distances = distances.sqrt()
        near = (1 + self.eps) / (self.eps + distances)
        if self.weighted:
            near = near * shares(stack, context.weights)
        # Without eps, models at the mean itself weigh everything, all the same.
        near = torch.where(near.isinf().any(), near.isinf().double(), near)
        weight = near / near.sum()
        return Verdict(average(stack, weight), weight)


@dataclass(frozen=True)
class LDawa(Rule):
    """Every tensor of a model weighs as its angle to the same tensor of the model sent: its cosine over K.

    Rehman, Gao, de Gusmao, Alibeigi, Shen, Lane: L-DAWA: Layer-wise Divergence Aware Weight Aggregation in Federated
    Self-Supervised Visual Representation Learning, ICCV 2023, arXiv 2307.07393: w^l = 1/K sum_k cos(w_k^l, w^l) w_k^l.
    Weights sum to less than 1 where models diverge, so that lengths shrink: the network should have normalization.

    Departures:
    1. Running statistics, scalars and what is no model are averaged plainly; the official code scales statistics too.
    2. Where a tensor or what was sent in its place is zero, as new biases are, the cosine is 1; the official code
       guards one of the two.
    """

    needs_models: ClassVar = True

    @classmethod
    def name(cls) -> str:
        return "l_dawa"

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        of_models(self, context)
        assert context.sent is not None  # it comes with the pieces
        value = average(stack)
        for piece in context.pieces:
            if piece.origin and piece.shape:
                sent, rows = context.sent[piece.columns].double(), stack[:, piece.columns].double()
                begun = sent if piece.origin == "difference" else torch.zeros_like(sent)
                models = rows + begun
                lengths = models.norm(dim=1) * sent.norm()
                cosine = torch.where(lengths > 0, (models @ sent / lengths).clamp(max=1), torch.ones_like(lengths))
                value[piece.columns] = ((cosine @ models) / len(stack) - begun).to(value.dtype)
        return Verdict(value, uniform(stack))


def of_models(rule: Rule, context: Context) -> list[Piece]:
    """The pieces that are models or differences of models; raises UsageError if there are none."""
    found = [piece for piece in context.pieces if piece.origin]
    if not found:
        raise UsageError(f"{rule.name()} compares models, and there is none in these replies")
    return found
