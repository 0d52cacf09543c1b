"""Topologies and the weights of mixing."""

import networkx
import pytest
import torch

from fedloom.errors import UsageError
from fedloom.methods.decentralized._graphs import TOPOLOGIES, metropolis, topology
from fedloom.random import stream


def drawn(kind, clients, degree=4, seed=0):
    return topology(kind, clients, stream(seed, "test"), degree)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 16])
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_graphs_are_undirected_connected_and_without_loops(kind, n):
    clients = [3 * k + 1 for k in range(n)]
    graph = drawn(kind, clients)
    assert list(graph) == clients
    assert all(a != b and a in graph[b] for a in graph for b in graph[a])
    assert networkx.is_connected(networkx.Graph([(a, b) for a in graph for b in graph[a]] or [(1, 1)]))


def test_degrees_are_those_of_the_kind():
    degrees = {kind: {len(near) for near in drawn(kind, range(16)).values()} for kind in TOPOLOGIES}
    assert degrees["ring"] == {2} and degrees["grid"] == {4} and degrees["complete"] == {15}
    assert degrees["exponential"] == {7}, "1, 2 and 4 both ways, and 8"
    assert degrees["random"] <= {2, 3, 4}
    assert drawn("random", range(16)) != drawn("random", range(16), seed=1)
    assert drawn("random", range(5), degree=4) == drawn("complete", range(5))


def edges(graph):
    return {frozenset((a, b)) for a in graph for b in graph[a]}


@pytest.mark.parametrize("n", [5, 8, 9, 13])
def test_exponential_neighbours_are_at_the_powers_of_two_below_the_size(n):
    powers = [p for p in (1, 2, 4, 8) if p < n]
    assert edges(drawn("exponential", range(n))) == {frozenset((a, (a + p) % n)) for a in range(n) for p in powers}


@pytest.mark.parametrize(("n", "high", "wide"), [(12, 4, 3), (16, 4, 4), (15, 5, 3)])
def test_a_grid_is_a_torus_as_square_as_can_be(n, high, wide):
    torus = networkx.grid_2d_graph(high, wide, periodic=True)
    assert edges(drawn("grid", range(n))) == {frozenset(r * wide + c for r, c in edge) for edge in torus.edges}


def test_a_random_graph_of_degree_two_is_one_ring_of_everybody_in_random_order():
    graph = drawn("random", range(12), degree=2)
    assert networkx.is_isomorphic(networkx.Graph([tuple(edge) for edge in edges(graph)]), networkx.cycle_graph(12))
    assert edges(graph) != edges(drawn("ring", range(12)))
    assert all(near == sorted(near) for near in drawn("random", range(12), degree=6).values())


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_weights_are_symmetric_and_doubly_stochastic(kind):
    graph = drawn(kind, range(12))
    graph[0].append(6) if 6 not in graph[0] else None  # an irregular graph
    graph[6] = sorted({*graph[6], 0})
    w = torch.zeros(12, 12, dtype=torch.float64)
    for i, row in metropolis(graph).items():
        for j, weight in row.items():
            w[i, j] = weight
    torch.testing.assert_close(w, w.T)
    torch.testing.assert_close(w.sum(1), torch.ones(12, dtype=torch.float64))
    assert (w >= 0).all() and all((w[i, j] > 0) == (j in graph[i]) for i in graph for j in graph if i != j)
    # The distance to the mean shrinks by the second largest eigenvalue at least.
    second = torch.linalg.eigvalsh(w).abs().sort().values[-2]
    x = torch.randn(12, 3, generator=stream(0, "test"), dtype=torch.float64)
    off = lambda z: (z - z.mean(0)).norm()  # noqa: E731 - a formula
    assert off(w @ x) <= second * off(x) + 1e-12 and second < 1


def test_weights_on_a_star():
    star = {0: [1, 2, 3, 4], 1: [0], 2: [0], 3: [0], 4: [0]}
    weights = metropolis(star)
    assert weights[0] == pytest.approx({0: 0.2, 1: 0.2, 2: 0.2, 3: 0.2, 4: 0.2})
    assert all(weights[leaf] == pytest.approx({0: 0.2, leaf: 0.8}) for leaf in (1, 2, 3, 4))


def test_weights_on_a_path_with_a_branch_are_of_each_edges_own_degrees():
    tree = {0: [1], 1: [0, 2, 3], 2: [1], 3: [1, 4], 4: [3]}
    weights = metropolis(tree)
    assert weights[1] == pytest.approx({0: 1 / 4, 2: 1 / 4, 3: 1 / 4, 1: 1 / 4})
    assert weights[4] == pytest.approx({3: 1 / 3, 4: 2 / 3}) and weights[3] == pytest.approx(
        {1: 1 / 4, 4: 1 / 3, 3: 5 / 12}
    )


def test_an_unknown_topology_is_refused():
    with pytest.raises(UsageError, match="did you mean 'ring'"):
        drawn("rng", range(3))
