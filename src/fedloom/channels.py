"""Narrow networks inside a wide one: which of its coordinates are those of some channels of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedloom.errors import UsageError
from fedloom.vector import Vector


def channels(model: Vector, level: float, order: Callable[[int], Tensor] = torch.arange) -> Tensor:
    """The coordinates of a network of width `level`, bool [size]: the first channels of every layer in an `order`.

    A layer's inputs are the outputs chosen in the layer before; all of the data come in, all classes go out. Raises
    UsageError for a network whose shapes are those of no chain of layers.
    """
    layout = model.layout
    mask = torch.zeros(layout.size, dtype=torch.bool)
    entries = dict(zip(layout.names, layout.views(mask), strict=True))
    last = [name for name, entry in entries.items() if entry.dim() > 1][-1]
    outputs = torch.ones(0, dtype=torch.bool)
    owners: dict[str, Tensor] = {}
    for name, entry in entries.items():
        owner = name.rpartition(".")[0]
        if entry.dim() > 1:
            inputs = outputs if len(outputs) else torch.ones(entry.shape[1], dtype=torch.bool)
            if entry.shape[1] % len(inputs):
                raise UsageError(
                    f"{name} {list(entry.shape)} does not follow {len(inputs)} outputs: no chain of layers"
                )
            inputs = inputs.repeat_interleave(entry.shape[1] // len(inputs))  # a channel is a block once it is flat
            count = len(entry) if name == last else math.ceil(level * len(entry))
            outputs = torch.zeros(len(entry), dtype=torch.bool)
            outputs[order(len(entry))[:count]] = True
            entry[...] = (outputs[:, None] & inputs).view(*outputs.shape, *inputs.shape, *[1] * (entry.dim() - 2))
        else:
            its = owners.get(owner, outputs)  # statistics come after all weights
            if len(entry) != len(its):
                raise UsageError(f"{name} {list(entry.shape)} does not belong to a layer of {len(its)} outputs")
            entry[...] = its
        owners.setdefault(owner, outputs)
    return mask.to(model.flat.device, non_blocking=True)
