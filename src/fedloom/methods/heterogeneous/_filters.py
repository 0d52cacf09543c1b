"""Convolutions over the weights of a network: from large tensors to small ones, and back."""

import torch
from torch.nn import functional as F

from fedloom.vector import Vector

POSITIVE, NEGATIVE = 0.85, 0.001  # the slopes of the activation, as in the official code


def fresh(large, small, draw):
    """Filters between two layouts, by entry: scale and offset [K], gain [K] and kernel [K, a, b], K kernel places.

    An entry has K = 1 but for convolutions, which have a filter for each of their places. A kernel begins as the one
    that cuts out a corner, with noise; an entry of one shape in both has none.
    """
    found = {}
    for name, wide, narrow in zip(large.names, large.shapes, small.shapes, strict=True):
        if wide == narrow or large.places[name] >= large.parameters:
            continue
        (k, *sides), (_, *short) = (matrices(torch.empty(shape)).shape for shape in (wide, narrow))
        size = [a - b + 1 for a, b in zip(sides, short, strict=True)]
        kernel = 0.1 / (size[0] * size[1]) ** 0.5 * torch.randn(k, *size, generator=draw)
        kernel[:, 0, 0] += 1
        scale = torch.zeros(k) if len(wide) == 4 else torch.ones(k)  # beside a residual, or instead of one
        found[name] = {
            "scale": scale,
            "offset": torch.zeros(k),
            "gain": kernel.flatten(1).norm(dim=1),
            "kernel": kernel,
        }
    return found


def through(w, layout, filters, *, grow):
    """A vector in another layout, whose entries are what filters make of those of `w`; differentiable in the filters.

    `grow`: by transposed convolutions. Running statistics are cut, or filled up with those of a fresh network.
    """
    entries = []
    for place, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
        x = w[name]
        if name in filters:
            x = convolved(matrices(x), filters[name], grow, residual=len(shape) == 4)
            x = activated(x).permute(1, 2, 0).reshape(shape) if len(shape) == 4 else activated(x).reshape(shape)
        elif place >= layout.parameters and grow:
            x = F.pad(x, (0, shape[0] - len(x)), value=float(name.endswith("running_var")))
        elif place >= layout.parameters:
            x = x[: shape[0]]
        entries.append(x)
    return Vector(layout.flatten(entries), layout)


def convolved(x, its, grow, residual):
    """Matrices [K, O, I] through filters: a scale and an offset, maybe beside themselves; then a convolution."""
    projected = its["scale"][:, None, None] * x + its["offset"][:, None, None]
    kernel = its["kernel"] * (its["gain"] / its["kernel"].flatten(1).norm(dim=1))[:, None, None]
    step = F.conv_transpose2d if grow else F.conv2d
    return step((projected + x if residual else projected)[None], kernel[:, None], groups=len(x))[0]


def activated(x):
    """0.85 x above zero, 0.001 x below."""
    return torch.where(x > 0, POSITIVE * x, NEGATIVE * x)


def matrices(x):
    """An entry as matrices [K, O, I]: one for each place of a convolution, one of a Linear, a row of a bias."""
    if x.dim() == 4:
        return x.flatten(2).permute(2, 0, 1)
    return x.reshape(1, 1, -1) if x.dim() < 2 else x[None]
