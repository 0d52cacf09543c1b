"""The server's own data as the root of trust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedloom.aggregators.rule import Context, Rule, Verdict
from fedloom.aggregators.stacked import along, average
from fedloom.errors import UsageError


@dataclass(frozen=True)
class Fltrust(Rule):
    """Replies are scaled to the length of the server's own, and weigh as much as they point in its direction.

    Cao, Fang, Liu, Gong: FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping, NDSS 2021,
    arXiv 2012.13995 (Algorithm 2: TS_i = max(cos(g_i, g_0), 0); g = sum_i TS_i ||g_0|| / ||g_i|| g_i / sum_i TS_i).
    Where nobody points the server's way the aggregate is zero, and `weight` is each reply's trust score, as a share.
    """

    needs_trusted: ClassVar = True

    def __call__(self, stack: Tensor, context: Context) -> Verdict:
        if context.trusted is None:
            raise UsageError("fltrust needs a reply that the server computes on its own data, and there is none")
        length = context.trusted.double().norm()
        lengths, products = along(stack, direction=context.trusted)
        trust = (products / (lengths * length)).clamp(min=0).nan_to_num(nan=0.0, posinf=0.0)
        total = trust.sum()
        if not total > 0:
            return Verdict(stack.new_zeros(stack.shape[1]), trust)
        share = trust / total
        return Verdict(average(stack, (share * length / lengths).nan_to_num(nan=0.0)), share)
