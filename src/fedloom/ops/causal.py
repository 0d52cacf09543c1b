"""Causal graphs from tests of independence: the PC algorithm's skeleton, colliders, Meek's rules, an extension.

A graph of d variables is a bool matrix [d, d]: `graph[i, j]` says that an edge may point from i to j. An edge without a
direction stands both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, combinations, permutations

import torch
from torch import Tensor

Test = Callable[[int, int, tuple[int, ...]], float]  # the p-value of independence of two variables given others
Separators = Mapping[frozenset[int], tuple[int, ...]]  # by a pair without an edge: what made it independent


def skeleton(test: Test, count: int, alpha: float) -> tuple[Tensor, Separators]:
    """PC-stable (Colombo and Maathuis, JMLR 2014): the undirected graph, and what separated those without an edge.

    An edge goes if its ends are independent, with a p-value above `alpha`, given some of the neighbors of one of them;
    these are the neighbors before any test with as many, so that the order of variables does not matter.
    """
    graph = ~torch.eye(count, dtype=torch.bool)
    separators: dict[frozenset[int], tuple[int, ...]] = {}
    size = 0
    while (graph.sum(1) > size).any():
        neighbors = [set(row.nonzero().flatten().tolist()) for row in graph]
        for i, j in combinations(range(count), 2):
            sets = [combinations(sorted(neighbors[a] - {b}), size) for a, b in ((i, j), (j, i))] if graph[i, j] else []
            for given in chain(*sets):
                if test(i, j, given) > alpha:
                    graph[i, j] = graph[j, i] = False
                    separators[frozenset((i, j))] = given
                    break
        size += 1
    return graph, separators


def collided(graph: Tensor, separators: Separators) -> Tensor:
    """The graph with i -> k <- j where i, j have no edge and k did not separate them; what has a direction keeps it."""
    graph = graph.clone()
    for k in range(len(graph)):
        for i, j in combinations((graph[:, k] | graph[k]).nonzero().flatten().tolist(), 2):
            apart = not graph[i, j] and not graph[j, i]
            if apart and k not in separators[frozenset((i, j))] and graph[i, k] and graph[j, k]:
                graph[k, i] = graph[k, j] = False
    return graph


def completed(graph: Tensor) -> Tensor:
    """Meek's first three rules (UAI 1995): what else must have a direction, without a new collider or a cycle."""
    graph = graph.clone()
    edges, before = graph | graph.T, None
    while before is None or not torch.equal(before, graph):
        before = graph.clone()
        for i, j in permutations(range(len(graph)), 2):
            if not (graph[i, j] and graph[j, i]):
                continue
            directed = graph & ~graph.T
            into = directed[:, j] & graph[i] & graph[:, i]  # k with i - k -> j
            sides = into.nonzero().flatten().tolist()
            first = (directed[:, i] & ~edges[:, j] & (torch.arange(len(graph)) != j)).any()
            second = (directed[i] & directed[:, j]).any()
            third = any(not edges[k, other] for k, other in combinations(sides, 2))
            if first or second or third:
                graph[j, i] = False
    return graph


def extended(graph: Tensor) -> Tensor:
    """A directed acyclic graph with these edges: Dor and Tarsi's (1992), or the next best where there is none.

    Again and again a variable is taken that no edge leaves and whose undirected neighbors are neighbors of all its
    others; all its edges point to it. Where there is none, one with the fewest edges out is taken.
    """
    left, found = set(range(len(graph))), torch.zeros_like(graph)
    while left:
        now = graph.clone()
        out = [k for k in range(len(graph)) if k not in left]
        now[out], now[:, out] = False, False
        edges, directed = now | now.T, now & ~now.T
        leaving = {k: int(directed[k].sum()) for k in left}

        def closed(k: int, edges: Tensor = edges, now: Tensor = now) -> bool:
            around = edges[k].nonzero().flatten().tolist()
            both = [one for one in around if now[k, one] and now[one, k]]
            return all(edges[one, other] for one in both for other in around if other != one)

        sink = min(left, key=lambda k: (leaving[k], not closed(k), k))
        found[:, sink] |= edges[:, sink]
        left.remove(sink)
    return found
