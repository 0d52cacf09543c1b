"""Networks on graphs: their inputs are numbers of nodes, whose graph they look up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedloom import nets
from fedloom.data.graph import Graphs
from fedloom.errors import UsageError
from fedloom.nets.net import Net

SYNTAX = "gcn:WIDTH,DROPOUT"


def build(name: str, graphs: Graphs, classes: int) -> Net:
    """A fresh network for nodes of `graphs`: `gcn:WIDTH,DROPOUT`, or one of `fedloom.nets` on each node by itself."""
    base, _, options = name.partition(":")
    if base == "gcn":
        width, dropout = _options(name, options)
        return Net(Convolved(graphs, width, dropout), nn.Linear(width, classes))
    net = nets.reference(name, (graphs.x.shape[1],), classes)
    return Net(nn.Sequential(Own(graphs), net.body), net.head)


def _options(name: str, options: str) -> tuple[int, float]:
    width, _, dropout = options.partition(",")
    try:
        chosen = int(width or 64), float(dropout or 0)
    except ValueError:
        chosen = 0, 0.0
    if chosen[0] < 1 or not 0 <= chosen[1] < 1:
        raise UsageError(f"model {name!r} has options that do not fit; expected {SYNTAX}, such as gcn:128,0.5")
    return chosen


class Convolution(nn.Module):
    """A x W + b: a node's new features from its neighbours' and its own [arXiv 1609.02907]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Features [n, F] and a sparse adjacency [n, n] to features [n, width]."""
        return torch.sparse.mm(adjacency, x @ self.weight.T) + self.bias


class Convolved(nn.Module):
    """Two graph convolutions over the whole graph that the nodes asked for are in."""

    def __init__(self, graphs: Graphs, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.graphs = graphs
        self.first = Convolution(graphs.x.shape[1], width)
        self.second = Convolution(width, width)
        # Without dropout there is no module that would draw.
        self.drop: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()

    def embed(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """What the second convolution makes of any graph, [n, width], before its ReLU."""
        out: Tensor = self.second(self.drop(self.first(x, adjacency).relu()), adjacency)
        return out

    def forward(self, numbers: Tensor) -> Tensor:
        """Features [B, width] of nodes (int64 [B]) of one graph."""
        x, adjacency, places = self.graphs.around(numbers)
        out: Tensor = self.drop(self.embed(x, adjacency)[places].relu())
        return out


class Own(nn.Module):
    """The features [B, F] of nodes (int64 [B]) themselves, their edges left out."""

    def __init__(self, graphs: Graphs) -> None:
        super().__init__()
        self.graphs = graphs

    def forward(self, numbers: Tensor) -> Tensor:
        x, _, places = self.graphs.around(numbers)
        return x[places]
