"""Clipping: the private fields of a reply, taken together, get at most the length of a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.boundary.privacy.base import WEIGHT, put, tensors
from fedloom.calls import SUMMED, Fields, Layer

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.node import Client
    from fedloom.site import Site

BOUND = "_clip"  # the bound, as it goes along with a message
WITHIN = "within"  # whether a reply was within it, as it comes back


def limited(flat: Mapping[str, Tensor], bound: float, order: int) -> tuple[dict[str, Tensor], bool]:
    """The tensors scaled to at most the bound in their joint norm of `order` 1 or 2, and whether they were within.

    A length that is no finite number becomes zero: neither clipping nor noise would cover it.
    """
    doubles = [t.double() for t in flat.values()]
    total = sum(float((t.abs() if order == 1 else t.square()).sum()) for t in doubles)
    length = total if order == 1 else math.sqrt(total)
    if length <= bound:
        return dict(flat), True
    # A hair below, so that rounding to the tensors' own precision does not lead beyond the bound.
    hair = max(1e-6, *(torch.finfo(t.dtype).eps for t in flat.values()))
    scale = bound * (1 - hair) / length
    return {name: t * scale if math.isfinite(length) else t.new_zeros(t.shape) for name, t in flat.items()}, False


def unweighted(call: Call, reply: Mapping[str, Any]) -> Fields:
    """A reply without its number of samples where a mean is taken of it: all count alike, and it is not told."""
    return {name: value for name, value in reply.items() if call.verb not in SUMMED or name != WEIGHT}


@dataclass(frozen=True)
class Clipping(Layer):
    """At a client, for central privacy; and again at the server, which faults and attackers may have sent more."""

    private: tuple[str, ...]
    adaptive: bool

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
        reply = inner()
        if call.verb != "mean" or BOUND not in message:
            return reply
        reply, within = self.clipped(call, reply, float(message[BOUND]))
        return reply | ({WITHIN: float(within)} if self.adaptive else {})

    def arrive(self, call: Call, client: int, reply: Fields, site: Site | None = None) -> Fields:
        if call.verb != "mean" or BOUND not in call.shared:
            return reply
        reply, _ = self.clipped(call, reply, float(call.shared[BOUND]))  # type: ignore[arg-type]
        return reply | {WITHIN: float(reply.get(WITHIN, 0) == 1)} if self.adaptive else reply

    def clipped(self, call: Call, reply: Mapping[str, Any], bound: float) -> tuple[Fields, bool]:
        flat, within = limited(tensors(reply, self.private), bound, 2)
        return put(unweighted(call, reply), flat), within


def protected(private: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Those of some fields that are private."""
    return sorted(set(fields) & set(private))
