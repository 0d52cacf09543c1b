"""Networks of several depths: the blocks of a body, and the network that has only the first of them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from fedloom.errors import UsageError

Block = tuple[str, ...]  # names of children of a network's body


def blocks(net: nn.Module) -> list[Block]:
    """The blocks of a network's body in their order: a child with matrices, and those behind it that have none.

    What stands before the first belongs to it. A body that is no `nn.Sequential` has none.
    """
    body = getattr(net, "body", None)
    if not isinstance(body, nn.Sequential):
        return []
    found: list[list[str]] = [[]]
    for name, child in body.named_children():
        if _matrices(child) and any(_matrices(body.get_submodule(one)) for one in found[-1]):
            found.append([])
        found[-1].append(name)
    return [tuple(block) for block in found if any(_matrices(body.get_submodule(one)) for one in block)]


def stages(net: nn.Module) -> list[list[Block]]:
    """The blocks in stages: all but the first block of a stage give what has the shape of what they get.

    A block goes on with the stage of the one before it if both are of one class, and either all its matrices are square
    or they have the shapes of those before. It has no more children than the first one has from its matrices on: what
    stands behind the last block (pooling, flattening) is not its own.
    """
    found: list[list[Block]] = []
    last: tuple[type, list[torch.Size]] | None = None
    size = 0
    for block in blocks(net):
        children = [net.get_submodule(f"body.{name}") for name in block]
        place = next(place for place, child in enumerate(children) if _matrices(child))
        kind, shapes = type(children[place]), _matrices(children[place])
        alike = last == (kind, shapes) or all(shape[0] == shape[1] for shape in shapes)
        if last and last[0] is kind and alike:
            found[-1].append(block[:size])
        else:
            found.append([block])
            size = len(block) - place
        last = kind, shapes
    return found


def depth(net: nn.Module) -> int:
    """The number of blocks of the longest stage; 1 says that no block can be left out, 0 that there is none."""
    return max(map(len, stages(net)), default=0)


def shallower(net: nn.Module, depth: int) -> nn.Module:
    """A network with the first `depth` blocks of each stage and the same names; its weights are those of `net`."""
    if depth < 1:
        raise UsageError(f"a network of {depth} blocks a stage; it has at least 1")
    out = {name for stage in stages(net) for block in stage[depth:] for name in block}
    if out:
        children = net.get_submodule("body").named_children()
        net.body = nn.Sequential(OrderedDict((name, child) for name, child in children if name not in out))
    return net


def _matrices(module: nn.Module) -> list[torch.Size]:
    """The shapes of a module's parameters with more than one axis."""
    return [param.shape for param in module.parameters() if param.dim() > 1]
