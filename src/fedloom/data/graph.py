"""Graphs whose nodes are samples: read from a file or planted, cut into communities, laid side by side."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import UsageError, unknown
from fedloom.random import numpy_stream, seed_of, stream

if TYPE_CHECKING:
    import networkx as nx

CUTS = ("louvain", "metis")


@dataclass(frozen=True)
class Graph:
    """Nodes with features `x` [N, F] and a class `y` (int64 [N]), and undirected `edges` (int64 [2, E]), each once."""

    x: Tensor
    y: Tensor
    edges: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def edges_among(self, nodes: Tensor) -> Tensor:
        """The edges [2, E'] between some nodes (int64 [n]), numbered by their places in `nodes`."""
        place = torch.full((len(self),), -1)
        place[nodes] = torch.arange(len(nodes))
        inside = place[self.edges]
        return inside[:, (inside >= 0).all(0)]

    def part(self, nodes: Tensor) -> Graph:
        """The graph that some nodes (int64 [n]) induce."""
        return Graph(self.x[nodes], self.y[nodes], self.edges_among(nodes))

    def networkx(self) -> nx.Graph[int]:
        """The same for networkx."""
        import networkx as nx

        made: nx.Graph[int] = nx.Graph()
        made.add_nodes_from(range(len(self)))
        made.add_edges_from(self.edges.T.tolist())
        return made

    def largest_component(self) -> Graph:
        """The part of the graph that hangs together and has most nodes."""
        import networkx as nx

        components: list[set[int]] = list(nx.connected_components(self.networkx()))
        largest = max(components, key=len)
        return self.part(torch.tensor(sorted(largest)))


@dataclass(frozen=True, eq=False)
class Graphs:
    """Graphs side by side over one set of features [N, F]: `nodes` (int64 [n]) and adjacency [n, n] of each.

    A node of graph g is known by its number `starts[g] + place`; networks get these numbers as their inputs. A copy
    is the same object: networks that hold it share it.
    """

    x: Tensor
    nodes: tuple[Tensor, ...]
    adjacency: tuple[Tensor, ...]  # sparse, normalised

    @staticmethod
    def of(graph: Graph, parts: Sequence[Tensor]) -> Graphs:
        """The graphs that parts (int64 [n]) of a graph induce: edges between parts are lost."""
        adjacency = [normalised(graph.edges_among(nodes), len(nodes), graph.x.dtype) for nodes in parts]
        return Graphs(graph.x, tuple(parts), tuple(adjacency))

    @cached_property
    def starts(self) -> list[int]:
        """The number of the first node of each graph, and as a last one how many there are."""
        return [0, *torch.tensor([len(nodes) for nodes in self.nodes]).cumsum(0).tolist()]

    def around(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [n, F] and adjacency [n, n] of the graph that nodes (int64 [B]) are in, and their places in it."""
        if numbers.is_floating_point() or numbers.dim() != 1:
            raise UsageError(
                f"a network on graphs reads numbers of nodes, int64 [B]; got {numbers.dtype} {list(numbers.shape)}"
            )
        graph = bisect_right(self.starts, int(numbers[0])) - 1
        places = numbers - self.starts[graph]
        if int(places.min()) < 0 or int(places.max()) >= len(self.nodes[graph]):
            raise UsageError("a batch has nodes of several graphs; give those of one graph at a time")
        return self.x.index_select(0, self.nodes[graph]), self.adjacency[graph], places

    def to(self, device: torch.device) -> Graphs:
        """The same on a device."""
        moved = [tuple(tensor.to(device) for tensor in tensors) for tensors in (self.nodes, self.adjacency)]
        return replace(self, x=self.x.to(device), nodes=moved[0], adjacency=moved[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return self


def normalised(edges: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 of undirected edges [2, E] over n nodes, sparse [n, n]; arXiv 1609.02907."""
    loops = torch.arange(n).expand(2, n)
    index = torch.cat([edges, edges.flip(0), loops], 1)
    degree = torch.bincount(index[0], minlength=n).to(dtype)
    weights = (degree[index[0]] * degree[index[1]]).rsqrt()
    return torch.sparse_coo_tensor(index, weights, (n, n), check_invariants=False).coalesce()


def read(path: str, scale: bool = True) -> Graph:
    """A graph from an .npz file: `x` [N, F], dense or as the CSR parts x_data, x_indices, x_indptr, x_shape; y; edges.

    Features without negative numbers, such as counts of words, are scaled to sum to 1 over each node, as is usual.
    Then, with `scale`, all are scaled by one number to a mean square of 1: on smaller ones graph networks start so flat
    that plain gradient descent does not leave the start (most papers take Adam there).
    """
    if not (Path(path).is_file() and path.endswith(".npz")):
        raise UsageError(
            f"problem graph reads a graph from an .npz file with x, y and edges, got data={path}; give one, "
            "or take problem=graph:sbm, a planted graph"
        )
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    lacking = [name for name in ("y", "edges", "x_data" if "x" not in arrays else "x") if name not in arrays]
    if lacking:
        raise UsageError(f"{path} has no {' and no '.join(lacking)}; it has {', '.join(sorted(arrays))}")
    if "x" not in arrays:
        arrays["x"] = np.zeros(arrays["x_shape"], np.float32)
        rows = np.repeat(np.arange(len(arrays["x"])), np.diff(arrays["x_indptr"]))
        arrays["x"][rows, arrays["x_indices"]] = arrays["x_data"]
    x, y = torch.from_numpy(arrays["x"]).float(), torch.from_numpy(arrays["y"]).long()
    if (x >= 0).all():
        x = x / x.sum(1, keepdim=True).clamp(min=1)
    if scale:
        x = x / x.square().mean().sqrt()
    edges = torch.from_numpy(arrays["edges"]).long()
    edges = edges[:, edges[0] != edges[1]].sort(0).values.unique(dim=1)
    if len(x) != len(y) or not ((edges >= 0) & (edges < len(y))).all():
        raise UsageError(f"{path}: {len(x)} rows of x, {len(y)} of y, and edges between nodes that are not among them")
    return Graph(x, y, edges)


def planted(
    sizes: Sequence[int], classes: int = 4, width: int = 16, groups: int = 2, noise: float = 1.0, seed: int = 0
) -> tuple[Graph, Tensor]:
    """A stochastic block model and the community (int64 [N]) of each node; community k has `sizes[k]` nodes.

    Two nodes of a community are joined with a chance of 12 in its nodes if they are of one class, of 3 in them if not;
    nodes of different communities with a chance of 1 in all nodes. A node's features are the centre of its class with
    noise. The communities take turns in belonging to `groups`, and what is one class's centre in one group is the
    next class's in the next: a model for all communities has to mistake some.
    """
    draw = numpy_stream(seed, "graph", "planted")
    community = np.repeat(np.arange(len(sizes)), sizes)
    n, size = len(community), np.asarray(sizes)[community]
    y = np.concatenate([np.arange(k) % classes for k in sizes])
    centres = draw.standard_normal((classes, width))
    x = centres[(y + community % groups) % classes] + noise * draw.standard_normal((n, width))
    pairs = []
    for i in range(n):  # a row at a time: all at once would be n * n
        same = np.where(y[i + 1 :] == y[i], 12.0, 3.0) / size[i]
        chance = np.where(community[i + 1 :] == community[i], same, 1.0 / n)
        hits = i + 1 + np.flatnonzero(draw.random(n - i - 1) < chance)
        pairs.append(np.stack([np.full_like(hits, i), hits]))
    edges = torch.from_numpy(np.concatenate(pairs, 1))
    return Graph(torch.from_numpy(x).float(), torch.from_numpy(y), edges), torch.from_numpy(community)


def communities(graph: Graph, parts: int, how: str = "louvain", seed: int = 0) -> list[Tensor]:
    """All nodes of a graph in `parts` communities, each an ascending int64 [n].

    `louvain`: communities of high modularity [arXiv 0803.0476], as coarse as there are enough of them; of more, the
    largest first goes to the part that has fewest nodes. `metis`: parts of about equal size with few edges between
    them [Karypis, Kumar 1998], by the extra `graphs`.
    """
    if how not in CUTS:
        raise unknown("cut of a graph", how, CUTS)
    if not 1 <= parts <= len(graph):
        raise UsageError(f"a graph of {len(graph)} nodes cannot be cut into {parts} parts")
    found = _louvain(graph, parts, seed) if how == "louvain" else _metis(graph, parts)
    if len(found) < parts or not all(map(len, found)):
        raise UsageError(f"{how} finds no {parts} communities in a graph of {len(graph)} nodes; take fewer clients")
    return [torch.tensor(sorted(nodes)) for nodes in found]


def _louvain(graph: Graph, parts: int, seed: int) -> list[list[int]]:
    import networkx as nx

    made, found = graph.networkx(), []
    for finer in range(12):
        found = nx.community.louvain_communities(
            made, resolution=2.0**finer, seed=seed_of(seed, "graph", "louvain") % 2**32
        )
        if len(found) >= parts:
            break
    held: list[list[int]] = [[] for _ in range(parts)]
    for community in sorted(found, key=lambda nodes: (-len(nodes), min(nodes))):
        min(held, key=len).extend(community)
    return held


def _metis(graph: Graph, parts: int) -> list[list[int]]:
    try:
        import pymetis
    except ImportError:
        raise UsageError("cut=metis needs the extra: pip install 'fedloom[graphs]'; or take cut=louvain") from None
    near = [list(neighbours) for _, neighbours in graph.networkx().adjacency()]
    owner = np.asarray(pymetis.part_graph(parts, adjacency=near).vertex_part)
    return [np.flatnonzero(owner == part).tolist() for part in range(parts)]


def halves(parts: Sequence[Tensor], times: int, seed: int = 0) -> list[Tensor]:
    """Of each part, `times` random halves one after the other; with `times` 1 the parts themselves."""
    if times == 1:
        return list(parts)
    made = []
    for k, nodes in enumerate(parts):
        for nth in range(times):
            order = torch.randperm(len(nodes), generator=stream(seed, "graph", "half", k, nth))
            made.append(nodes[order[: max(1, len(nodes) // 2)].sort().values])
    return made
