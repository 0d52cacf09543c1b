"""A plain network as its layers' rows: one row of weights and a bias for every neuron or filter.

For methods that match, add or remove neurons: what a row is multiplied with are the rows of the layer before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.errors import UsageError
from fedloom.node import Node
from fedloom.vector import Layout, Vector

KINDS = {  # networks by the names of their layers; what is not among them is an mlp
    "cnn": ["body.conv1", "body.conv2", "body.fc1", "head"],
    "lenet": ["body.conv1", "body.conv2", "body.fc1", "body.fc2", "head"],
}


def layers_of(layout: Layout) -> list[str]:
    """The names of a network's layers; raises UsageError unless all have weights and biases and nothing else."""
    names = [name.removesuffix(".weight") for name in layout.names if name.endswith(".weight")]
    if [f"{name}.{kind}" for name in names for kind in ("weight", "bias")] != list(layout.names):
        raise _strange(layout)
    return names


def rows_of(v: Vector) -> list[Tensor]:
    """Of every layer the rows [L, D + 1]: weights, then the bias."""
    return [torch.cat([v[f"{name}.weight"].flatten(1), v[f"{name}.bias"][:, None]], 1) for name in layers_of(v.layout)]


def inputs(rows: Tensor, width: int, wanted: Tensor) -> Tensor:
    """Rows [L, D + 1] behind a layer of `width` neurons as rows behind those of them that are `wanted` [W]."""
    return torch.cat([_blocks(rows, width)[:, wanted].flatten(1), rows[:, -1:]], 1)


def scattered(rows: Tensor, where: Tensor, width: int) -> Tensor:
    """The reverse: rows behind neurons that have gone to the places `where` [W] of `width`; zeros elsewhere."""
    own = _blocks(rows, len(where))
    wide = own.new_zeros(len(own), width, own.shape[2])
    wide[:, where] = own
    return torch.cat([wide.flatten(1), rows[:, -1:]], 1)


def assembled(node: Node, rows: Sequence[Tensor]) -> Vector:
    """The network with these rows, as wide as they are and of the kind of the task's; `node` knows it from now on."""
    names = layers_of(node.layout)
    kind = next((kind for kind, its in KINDS.items() if its == names), "mlp")
    widths = ",".join(str(len(layer)) for layer in rows[:-1])
    w = node.network(f"{kind}:{widths}" if widths else "linear")
    if layers_of(w.layout) != names:
        raise _strange(node.layout)
    for name, layer in zip(names, rows, strict=True):
        part = w.select(f"{name}.*").clone()
        part[f"{name}.weight"].copy_(layer[:, :-1].view_as(part[f"{name}.weight"]))
        part[f"{name}.bias"].copy_(layer[:, -1])
        w = w.merge(part)
    return w


def _blocks(rows: Tensor, width: int) -> Tensor:
    """Weights [L, width, B] by the neuron they come from: k * k a channel, or one for each place of it."""
    return rows[:, :-1].unflatten(1, (width, -1))


def _strange(layout: Layout) -> UsageError:
    return UsageError(
        f"a network of plain layers with weights and biases is needed, got {layout}; take --model mlp:64, cnn or lenet"
    )
