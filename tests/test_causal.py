"""Causal graphs: PC, colliders, Meek's rules and extensions against all graphs of four variables; the problem."""

from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

import fedloom
from fedloom import tasks
from fedloom.errors import UsageError
from fedloom.ops.causal import collided, completed, extended, skeleton
from fedloom.random import numpy_stream
from fedloom.runs.spec import Spec
from fedloom.tasks.causal import Causal, f1

SIZE = 4
PAIRS = list(combinations(range(SIZE), 2))


def acyclic(graph):
    return np.linalg.matrix_power(graph + np.eye(len(graph), dtype=int), len(graph)).diagonal().sum() == len(graph)


def all_graphs():
    """All 543 directed acyclic graphs of four variables."""
    for ways in product((0, 1, 2), repeat=len(PAIRS)):
        graph = np.zeros((SIZE, SIZE), dtype=int)
        for (i, j), way in zip(PAIRS, ways, strict=True):
            graph[i, j], graph[j, i] = way == 1, way == 2
        if acyclic(graph):
            yield graph


def kind(graph):
    """What graphs of the same independences share: edges, and colliders whose ends have no edge."""
    edges = graph | graph.T
    colliders = {
        (i, k, j)
        for k in range(len(graph))
        for i, j in combinations(graph[:, k].nonzero()[0].tolist(), 2)
        if not edges[i, j]
    }
    return edges.tobytes(), frozenset(colliders)


ALL = list(all_graphs())
CLASSES = {}
for one in ALL:
    CLASSES.setdefault(kind(one), []).append(one)


def exact(graph, seed=0):
    """A test that knows: partial correlations of a linear model along the graph, with weights that cancel nowhere."""
    draw = numpy_stream(seed, "causal")
    size = len(graph)
    weights = graph * draw.uniform(0.5, 1.5, (size, size)) * draw.choice([-1, 1], (size, size))
    paths = np.linalg.inv(np.eye(size) - weights)
    c = paths.T @ paths

    def test(i, j, given):
        precision = np.linalg.inv(c[np.ix_([i, j, *given], [i, j, *given])])
        return float(abs(precision[0, 1]) < 1e-9)

    return test


def test_there_are_543_graphs_in_185_classes():
    assert len(ALL) == 543 and len(CLASSES) == 185


def test_every_class_is_found_as_it_is():
    for members in CLASSES.values():
        true = members[0]
        graph, separators = skeleton(exact(true), SIZE, 0.5)
        assert np.array_equal(graph.numpy(), (true | true.T).astype(bool))
        found = completed(collided(graph, separators))
        union = np.bitwise_or.reduce(members).astype(bool)  # both ways where members differ
        assert np.array_equal(found.numpy(), union)
        whole = extended(found).numpy().astype(int)
        assert any(np.array_equal(whole, member) for member in members)


def test_directions_that_are_known_are_kept_and_lead_to_others():
    """A fork of known direction: of a square with one diagonal all follows, as Meek's third rule says."""
    graph = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3)):
        graph[i, j] = graph[j, i] = True
    graph[3, 1] = graph[3, 2] = False
    found = completed(graph)
    assert found[0, 3] and not found[3, 0] and found[0, 1] and found[1, 0]
    graph[1, 2] = graph[2, 1] = True
    assert completed(graph)[3, 0], "where these are neighbors themselves, nothing follows"
    chain = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 1, 0]]).bool()
    assert completed(chain).tolist() == [[False, True, False], [False, False, True], [False, False, False]]
    triangle = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 0, 0]]).bool()  # 0 -> 1 -> 2, 0 - 2
    assert not completed(triangle)[2, 0] and completed(triangle)[0, 2]


def test_a_collider_does_not_turn_what_has_a_direction():
    graph = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()
    graph[1, 2] = True  # 0 -> 1 - 2
    turned = graph.clone()
    turned[2, 1] = False  # 1 -> 2
    pairs = {frozenset((0, 2)): ()}
    assert collided(graph, pairs)[1, 2].item() is False
    assert torch.equal(collided(turned, pairs), turned)


def test_the_order_of_variables_does_not_matter_to_the_skeleton():
    draw = numpy_stream(1, "causal")
    values = {frozenset((i, j)): draw.uniform(0, 1, 8) for i, j in combinations(range(5), 2)}

    def under(order):
        place = {variable: k for k, variable in enumerate(order)}
        names = {k: variable for variable, k in place.items()}

        def test(i, j, given):
            bits = sum(2 ** (names[k] % 3) for k in given) % 8
            return values[frozenset((names[i], names[j]))][bits]

        graph, _ = skeleton(test, 5, 0.85)
        index = [place[variable] for variable in range(5)]
        return graph[index][:, index]

    graphs = [under(order) for order in list(permutations(range(5)))[::17]]
    assert all(torch.equal(graphs[0], graph) for graph in graphs) and 0 < graphs[0].sum() < 20


def test_where_there_is_no_extension_it_is_acyclic_all_the_same():
    square = torch.zeros(4, 4, dtype=torch.bool)
    for i in range(4):
        square[i, (i + 1) % 4] = square[(i + 1) % 4, i] = True
    found = extended(square).numpy().astype(int)
    assert acyclic(found) and np.array_equal(found | found.T, square.numpy().astype(int))
    circle = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()
    assert acyclic(extended(circle).numpy().astype(int)) and extended(circle).sum() == 3


def graph_of(size, *pairs):
    found = torch.zeros(size, size, dtype=torch.bool)
    for i, j in pairs:
        found[i, j] = True
    return found


def test_the_measures_by_hand():
    task = Causal(variables=4, sizes=(3, 4))
    task.graph = graph_of(4, (0, 1), (1, 2), (3, 2))
    measured = task.judge(graph_of(4, (0, 1), (2, 1), (0, 3)), task.global_test())  # one turned, one lost, one too many
    assert measured["n"] == 7 and measured["shd"] == measured["loss"] == 3
    assert measured["skeleton_f1"] == pytest.approx(2 / 3) and measured["direction_f1"] == pytest.approx(1 / 3)
    both = task.judge(graph_of(4, (0, 1), (1, 0), (1, 2), (3, 2)), task.global_test())
    assert both["shd"] == 1 and both["skeleton_f1"] == 1 and both["direction_f1"] == pytest.approx(6 / 7)
    perfect = {"n": 7, "loss": 0.0, "shd": 0.0, "skeleton_f1": 1.0, "direction_f1": 1.0}
    assert task.judge(task.graph, task.global_test()) == perfect
    assert f1(graph_of(2), graph_of(2)) == 1 and f1(graph_of(2, (0, 1)), graph_of(2)) == 0


@pytest.mark.parametrize("kind", ["linear", "general"])
def test_rows_follow_the_graph_and_clients_differ(kind):
    task = Causal(kind, 6, (4000, 4000), seed=1)
    assert acyclic(task.graph.numpy().astype(int)) and task.graph.sum() == 6
    causes = task.graph.any(0)
    x = task.data(0, "train").x
    if kind == "linear":
        for j in range(6):
            parents = task.graph[:, j].nonzero().flatten()
            design = torch.cat([x[:, parents], torch.ones(len(x), 1, dtype=x.dtype)], 1)
            left = x[:, j] - design @ torch.linalg.lstsq(design, x[:, j]).solution
            others = [k for k in range(6) if k != j and not reaches(task.graph, j, k)]
            assert (left[:, None] * (x - x.mean(0)) / x.std(0)).mean(0).abs()[others].max() < 0.1
    assert x[:, causes].std() > 1
    means = torch.stack([task.data(k, "train").x.mean(0) for k in (0, 1)])
    assert (means[0] - means[1]).abs().max() > 0.3
    again, other = Causal(kind, 6, (4000, 4000), seed=1), Causal(kind, 6, (4000, 4000), seed=2)
    assert torch.equal(again.x, task.x) and not torch.equal(other.x, task.x)


def reaches(graph, i, j):
    paths = torch.linalg.matrix_power(torch.eye(len(graph)) + graph.float(), len(graph))
    return bool(paths[i, j] > 0)


def test_the_problem_by_its_settings_and_what_it_refuses():
    task = tasks.build(Spec(problem="causal:general,variables=5,samples=20", clients=3))
    assert (task.kind, task.variables, task.population, len(task.data(2, "train"))) == ("general", 5, 3, 20)
    assert task.offers == task.demands == {"causal"}
    assert task.network()(task.x).shape == task.x.shape
    for problem, complaint in (
        ("causal:cubic", "a causal problem of the kind 'cubic'; expected linear or general"),
        ("causal:linear,variables=1", "a causal problem of 1 variables; it has at least 2"),
    ):
        with pytest.raises(UsageError, match=complaint):
            tasks.build(Spec(problem=problem))
    with pytest.raises(UsageError, match="fedavg cannot learn a problem of the kind causal; take fedcdh"):
        fedloom.run("fedavg", problem="causal", rounds=1)
    with pytest.raises(UsageError, match=r"judges a graph, bool \[6, 6\]; got torch.float32 \[6, 6\]"):
        Causal().judge(torch.zeros(6, 6), Causal().global_test())
