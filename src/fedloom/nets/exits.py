"""Networks that can stop early: a linear head behind every few blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError
from fedloom.nets.depth import blocks


class Exits(nn.Module):
    """A body in groups of children, `sizes` of them each, and behind each group a head of its own: `exits.0`, ...

    Its scores are those of the last exit.
    """

    def __init__(self, body: nn.Sequential, sizes: list[int], heads: list[nn.Linear]) -> None:
        super().__init__()
        self.body, self.exits = body, nn.ModuleList(heads)
        self.sizes = sizes

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """The scores [B, classes] of every exit for inputs [B, ...], the shallowest first."""
        children = iter(self.body)
        for size, head in zip(self.sizes, self.exits, strict=True):
            for _ in range(size):
                x = next(children)(x)
            yield head(pooled(x))

    def forward(self, x: Tensor) -> Tensor:
        *_, last = self.outputs(x)
        return last


def exiting(net: nn.Module, shape: tuple[int, ...], every: int, exits: int | None = None) -> Exits:
    """The first part of a network, with a fresh head behind every so many blocks of its body.

    Args:
        net: a network with a body of blocks (`fedloom.nets.depth`) and a linear head, which is left out.
        shape: one input without the batch.
        every: blocks from one exit to the next; the last may come sooner.
        exits: so many, the first ones; None: all. Names are those of the network of all.
    """
    found = blocks(net)
    groups = [sum(found[start : start + every], ()) for start in range(0, len(found), every)][:exits]
    children = dict(net.get_submodule("body").eval().named_children())
    heads, head = [], net.get_submodule("head")
    if not isinstance(head, nn.Linear):
        raise UsageError(
            f"exits are linear heads, and the network's own is a {type(head).__name__}; take another network"
        )
    x = torch.zeros(1, *shape, device=head.weight.device)
    for group in groups:
        with torch.no_grad():
            for name in group:
                x = children[name](x)
        heads.append(nn.Linear(pooled(x).shape[1], head.out_features))
    body = nn.Sequential(OrderedDict((name, children[name]) for group in groups for name in group))
    return Exits(body, [len(group) for group in groups], heads)


def pooled(x: Tensor) -> Tensor:
    """States [B, D, ...] as their means over all places, [B, D]."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x
