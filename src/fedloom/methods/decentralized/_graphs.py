"""Who talks to whom where there is no server: topologies, and weights under which mixing keeps the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fedloom.errors import unknown

Graph = dict[int, list[int]]  # a client and its neighbors, without itself, ascending

TOPOLOGIES = ("ring", "grid", "exponential", "random", "complete")


def topology(kind: str, clients: Sequence[int], generator: torch.Generator, degree: int = 10) -> Graph:
    """An undirected connected graph over some clients.

    `ring`: two neighbors. `grid`: a torus, as square as the number of clients allows. `exponential`: neighbors at the
    distances 1, 2, 4, ... `random`: rings in random orders laid over each other, for `degree` neighbors at most, and
    at least two (all of them where there are no more). `complete`: everybody.
    """
    if kind not in TOPOLOGIES:
        raise unknown("topology", kind, TOPOLOGIES)
    n = len(clients)
    pairs: set[tuple[int, int]] = set()
    if kind == "complete" or (kind == "random" and degree >= n - 1):
        pairs = {(a, b) for a in range(n) for b in range(a)}
    elif kind == "ring":
        pairs = {(a, (a + 1) % n) for a in range(n)}
    elif kind == "exponential":
        pairs = {(a, (a + 2**hop) % n) for a in range(n) for hop in range(max(1, math.ceil(math.log2(n or 1))))}
    elif kind == "grid":
        wide = next(w for w in range(math.isqrt(n), 0, -1) if n % w == 0) if n else 1
        pairs = {(a, a - a % wide + (a + 1) % wide) for a in range(n)} | {(a, (a + wide) % n) for a in range(n)}
    else:
        for _ in range(max(1, degree // 2)):
            order = torch.randperm(n, generator=generator).tolist()
            pairs |= set(zip(order, [*order[1:], *order[:1]], strict=True))
    neighbours: dict[int, set[int]] = {client: set() for client in clients}
    for a, b in pairs:
        if a != b:
            neighbours[clients[a]].add(clients[b])
            neighbours[clients[b]].add(clients[a])
    return {client: sorted(near) for client, near in neighbours.items()}


def metropolis(graph: Mapping[int, Sequence[int]]) -> dict[int, dict[int, float]]:
    """Weights of every client's neighbors, and of itself: symmetric, and every row sums to 1 [Xiao, Boyd 2004].

    `w_ij = 1 / (1 + max(deg_i, deg_j))` on the edges of an undirected graph, and `w_ii` what is left.
    """
    weights = {}
    for client, near in graph.items():
        row = {other: 1.0 / (1 + max(len(near), len(graph[other]))) for other in near}
        weights[client] = row | {client: 1.0 - sum(row.values())}
    return weights
