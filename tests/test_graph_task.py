"""Graphs as problems: reading, planting, cutting, what a client sees, and what a network computes."""

import copy
import pickle  # noqa: TID251 - how a task reaches a worker that was not forked

import numpy as np
import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

from fedloom import nets, tasks
from fedloom.data.graph import Graph, communities, halves, normalised, planted, read
from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.nets.gcn import Convolution, Convolved
from fedloom.random import seeded
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.tasks.graph import dealt, split, toy

PLANTED = Spec(problem="graph:sbm", clients=6)


def dense(graphs, g):
    return graphs.adjacency[g].to_dense()


def test_an_induced_subgraph_has_the_edges_between_its_nodes():
    graph = Graph(torch.eye(5), torch.arange(5), torch.tensor([[0, 0, 1, 3], [1, 4, 2, 4]]))
    part = graph.part(torch.tensor([4, 0, 1]))
    assert part.y.tolist() == [4, 0, 1] and {frozenset(e) for e in part.edges.T.tolist()} == {
        frozenset((1, 2)),  # 0 - 1
        frozenset((1, 0)),  # 0 - 4
    }
    assert torch.equal(graph.largest_component().y, torch.arange(5))
    assert graph.part(torch.tensor([0, 2, 3, 4])).largest_component().y.tolist() == [0, 3, 4]


def test_the_adjacency_by_hand():
    a = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    d = a.sum(1)
    expected = a / (d[:, None] * d[None, :]).sqrt()
    torch.testing.assert_close(normalised(torch.tensor([[0, 2], [1, 1]]), 4).to_dense(), expected)


def test_planted_communities_are_found_again():
    graph, community = planted((50, 60, 70, 55), seed=3)
    for how in ("louvain", "metis"):
        found = communities(graph, 4, how)
        assert torch.equal(torch.cat(found).sort().values, torch.arange(len(graph))), "every node once"
        pure = sum(int(torch.bincount(community[nodes]).max()) for nodes in found)
        assert pure > 0.9 * len(graph), how
    assert {len(communities(graph, k)) for k in (1, 3, 11)} == {1, 3, 11}
    repeated = communities(graph, 11)
    assert all(torch.equal(a, b) for a, b in zip(communities(graph, 11), repeated, strict=True))


def test_a_planted_group_names_its_classes_otherwise():
    graph, community = planted((200,) * 4, noise=0.1)
    centres = torch.stack([graph.x[(community == k) & (graph.y == 0)].mean(0) for k in range(4)])
    apart = torch.cdist(centres, centres)
    assert apart[0, 2] < 0.2 and apart[1, 3] < 0.2 and apart[0, 1] > 1


@pytest.mark.parametrize("overlap", [1, 3])
def test_every_client_has_a_part_and_its_splits_are_disjoint(overlap):
    task = tasks.build(Spec(problem=f"graph:sbm,overlap={overlap},train=0.3,test=0.3", clients=6))
    held = []
    for k in range(6):
        numbers = torch.cat([task.data(k, split).x for split in ("train", "validation", "test")])
        start, stop = task.graphs.starts[k : k + 2]
        assert torch.equal(numbers.sort().values, torch.arange(start, stop))
        assert len(task.data(k, "train")) == pytest.approx(0.3 * (stop - start), abs=1 if overlap == 1 else 8)
        held.append(set(task.graphs.nodes[k].tolist()))
    shared = len(held[0] & held[1]) / len(held[0])
    assert shared == 0 if overlap == 1 else 0.3 < shared < 0.7
    assert task.population == 6 and task.offers == {"graph"} and len(task.describe()["clients"]) == 6


def test_a_node_is_in_one_split_at_all_clients_that_know_it():
    task = tasks.build(Spec(problem="graph:sbm,overlap=3", clients=6))
    nodes = torch.cat(task.graphs.nodes)
    seen = {
        split: set(nodes[torch.cat([task.data(k, split).x for k in range(6)])].tolist()) for split in ("train", "test")
    }
    assert seen["train"] and not seen["train"] & seen["test"]
    tested = task.global_test()
    assert set(nodes[tested.x].tolist()) == seen["test"] and int(tested.x.min()) >= task.graphs.starts[-2]
    assert torch.equal(task.graphs.nodes[-1][tested.x - task.graphs.starts[-2]], nodes[tested.x])


def test_the_network_computes_what_the_formula_says_on_the_clients_graph_alone():
    task = toy()
    net = task.network()
    data = task.data(2, "test")
    a, x = dense(task.graphs, 2), task.graphs.x[task.graphs.nodes[2]]
    one, two = net.body.first, net.body.second
    h = (a @ (x @ one.weight.T) + one.bias).relu()
    z = a @ (h @ two.weight.T) + two.bias
    torch.testing.assert_close(net.body.embed(x, task.graphs.adjacency[2]), z)
    places = data.x - task.graphs.starts[2]
    torch.testing.assert_close(net(data.x), net.head(z.relu())[places])
    small, whole = net(data.x[:3]), net(data.x)[:3]
    torch.testing.assert_close(small, whole)  # a node's scores do not depend on the batch that it is in


def test_the_bias_is_added_after_the_neighbours_are_mixed():
    task = toy()
    net, a, x = task.network(), dense(task.graphs, 2), task.graphs.x[task.graphs.nodes[2]]
    layer = net.body.first
    assert not layer.bias.any()
    torch.nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x, task.graphs.adjacency[2]), a @ x @ layer.weight.T + layer.bias)


def test_the_convolutions_have_weights_of_their_own_also_where_they_are_alike():
    graphs = toy().graphs
    net, a, x = Convolved(graphs, graphs.x.shape[1]), dense(graphs, 2), graphs.x[graphs.nodes[2]]
    h = (a @ x @ net.first.weight.T).relu()
    torch.testing.assert_close(net.embed(x, graphs.adjacency[2]), a @ h @ net.second.weight.T)


def test_weights_start_from_glorots_uniform_law():
    with seeded(0, "test"):
        weight = Convolution(300, 100).weight.detach()
    bound = (6 / 400) ** 0.5
    assert 0.999 * bound < weight.abs().max() <= bound and abs(weight.std() * 3**0.5 / bound - 1) < 0.02


def test_dropout_stands_behind_both_convolutions():
    task = tasks.build(Spec(problem="graph:sbm", clients=2, model="gcn:8,0.5"))
    net, numbers = task.network().train(), torch.tensor([7, 2, 4])
    x, a, places = task.graphs.around(numbers)
    with seeded(3, "test"):
        found = net.features(numbers)
    with seeded(3, "test"):
        h = F.dropout(net.body.first(x, a).relu(), 0.5)
        expected = F.dropout(net.body.second(h, a)[places].relu(), 0.5)
    torch.testing.assert_close(found, expected)


def test_a_network_on_each_node_by_itself_sees_its_own_features():
    task = tasks.build(Spec(problem="graph:sbm", clients=2, model="mlp:8"))
    net, numbers = task.network(), torch.tensor([7, 2, 4])
    x = task.graphs.x[task.graphs.nodes[0][numbers]]
    plain = torch.nn.Sequential(*list(net.body.children())[1:], net.head)
    torch.testing.assert_close(net(numbers), plain(x))


def test_edges_to_other_clients_are_lost_but_the_whole_graph_has_them():
    task = tasks.build(PLANTED)
    inside = sum((dense(task.graphs, k) > 0).sum().item() for k in range(6))
    assert inside < (dense(task.graphs, 6) > 0).sum().item()
    net = task.network()
    assert not torch.equal(net(torch.arange(50)), net(task.graphs.starts[6] + task.graphs.nodes[0][:50]))


def test_a_batch_of_another_kind_is_refused():
    net = toy().network()
    with pytest.raises(UsageError, match="nodes of several graphs"):
        net(torch.tensor([0, toy().graphs.starts[1]]))
    with pytest.raises(UsageError, match=r"reads numbers of nodes, int64 \[B\]; got torch.float32"):
        net(torch.zeros(3, 6))


def test_graphs_are_shared_and_no_part_of_a_model():
    task = toy()
    site = Site(task, seed=0)
    assert site.initial.layout.names == (
        "body.first.weight", "body.first.bias", "body.second.weight", "body.second.bias", "head.weight", "head.bias"
    )  # fmt: skip
    assert node(site, 0).net(site.initial).body.graphs is task.graphs
    assert copy.deepcopy(task.graphs) is task.graphs
    sent = pickle.loads(pickle.dumps(task))  # noqa: S301 - our own
    for x in (task.data(1, "train").x, task.global_test().x):
        again = sent.network()
        again.load_state_dict(site.bench.net.state_dict())
        assert torch.equal(site.bench.net(x), again(x))


def test_graph_convolutions_beat_what_looks_at_each_node_alone():
    graph, community = planted((80,) * 4, groups=1, noise=2.0)
    parts = [(community == k).nonzero().flatten() for k in range(4)]
    roles = split(parts, 0.4, 0.4, seed=0)
    accuracy = {}
    for model in ("gcn:16", "mlp:16"):
        made = ran(FedAvg(lr=0.2, batch=10), dealt(graph, parts, roles, model, "planted", "planted"), rounds=20)
        accuracy[model] = made.record.final["global_test_accuracy"]
    assert accuracy["gcn:16"] > accuracy["mlp:16"] + 0.05 > 0.4


@pytest.mark.parametrize(("model", "dropout"), [("gcn", 0), ("gcn:8", 0), ("gcn:8,0.5", 0.5), ("mlp:8,4", None)])
def test_networks_by_name(model, dropout):
    task = tasks.build(Spec(problem="graph:sbm", clients=2, model=model))
    net = task.network()
    assert net(torch.arange(5)).shape == (5, 4)
    drops = [m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops == ([dropout] if dropout else [])
    assert net.train()(torch.arange(5)).isfinite().all()
    if dropout:
        assert not torch.equal(net(torch.arange(5)), net(torch.arange(5))), "training drops, anew each time"


@pytest.mark.parametrize("model", ["gcn:0", "gcn:8,1.5", "gcn:8,1", "gcn:8,2,3", "gcn:x", "cnn"])
def test_networks_that_do_not_fit_are_refused(model):
    with pytest.raises(UsageError, match="model"):
        tasks.build(Spec(problem="graph:sbm", clients=2, model=model))


def test_rows_without_a_graph_are_refused_by_graph_networks():
    with pytest.raises(UsageError, match="model 'gcn' reads graphs, got numbers"):
        nets.build("gcn", (6,), 3)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"problem": "graph"}, "reads a graph from an .npz file .* got data=digits"),
        ({"problem": "graph:cora"}, "expected graph:sbm, or graph with data=FILE.npz"),
        ({"problem": "graph:sbm,cut=metiss"}, "unknown cut of a graph 'metiss'"),
        ({"problem": "graph:sbm,overlap=4"}, "6 clients are no multiple of overlap=4"),
        ({"problem": "graph:sbm,train=0.7"}, "train=0.7 and test=0.4; expected shares above 0, up to 1 together"),
        ({"problem": "graph:sbm", "partition": "iid"}, "does not read partition=iid"),
        ({"problem": "graph:sbm", "validation": 0.2}, "does not read validation=0.2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        tasks.build(Spec(clients=6, **settings))


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "own.npz"
    x = np.array([[2.0, 2], [0, 4], [0, 0], [1, 0]])
    edges = np.array([[0, 1, 1, 2, 2], [1, 0, 1, 1, 3]])
    np.savez(path, x=x, y=np.array([0, 1, 0, 1]), edges=edges)
    graph = read(str(path), scale=False)
    assert {tuple(e) for e in graph.edges.T.tolist()} == {(0, 1), (1, 2), (2, 3)}, "each once, no loops"
    assert graph.x.tolist() == [[0.5, 0.5], [0, 1], [0, 0], [1, 0]]
    scaled = read(str(path)).x
    assert float(scaled.square().mean()) == pytest.approx(1)
    torch.testing.assert_close(scaled / scaled.max(), graph.x)
    np.savez(path, y=np.array([0]), edges=edges)
    with pytest.raises(UsageError, match="has no x_data; it has edges, y"):
        read(str(path))
    np.savez(path, x=x, y=np.array([0, 1, 0, 1]), edges=edges + 1)
    with pytest.raises(UsageError, match="nodes that are not among them"):
        read(str(path))


def test_halves_are_random_parts_of_about_half():
    parts = [torch.arange(40), torch.arange(40, 61)]
    made = halves(parts, 3)
    assert [len(nodes) for nodes in made] == [20, 20, 20, 10, 10, 10]
    assert set(made[0].tolist()) != set(made[1].tolist()) and set(made[4].tolist()) < set(parts[1].tolist())
    assert halves(parts, 1) == parts


@pytest.mark.parametrize(("name", "nodes"), [("cora", 2485), ("citeseer", 2120)])
def test_citation_graphs(shared_data, name, nodes):
    spec = Spec(problem="graph:cut=metis", data=str(shared_data("planetoid") / f"{name}.npz"), clients=10)
    task = tasks.build(spec)
    sizes = [len(part) for part in task.graphs.nodes]
    assert sizes[-1] == nodes == sum(sizes[:-1]) and max(sizes[:-1]) < 1.1 * min(sizes[:-1])
    y, edges = task.federation.y, task.graphs.adjacency[-1].indices()
    alike = y[task.graphs.starts[-2] + edges].diff(dim=0).eq(0).double().mean()
    assert alike > 0.7, "cited papers are mostly of one class"
