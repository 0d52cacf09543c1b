"""InCo Aggregation: networks of several depths, and the updates of shallow blocks in those of deep ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import descended, network, node, ran
from torch import nn

from fedloom import nets
from fedloom.errors import UsageError
from fedloom.methods.heterogeneous.inco import InCo, crossed, references
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.tasks.toy import Toy

DEEP = {"blocks": 3}  # client k has the first 1 + k modulo 3 of them
FIRST, SECOND, THIRD = (f"body.{2 + b}.layers.0.weight" for b in range(3))


def by_hand(a, b, bound=5.0, clip=0.1):
    """The paper's equations for one slice, in plain numpy."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    long, wide = np.sqrt((a * a).sum()), np.sqrt((b * b).sum())
    theta = min(abs(np.trace(b.reshape(len(b), -1).T @ a.reshape(len(a), -1))) / ((b * b).sum() + 1e-7), bound)
    return np.clip((a / (long + 1e-7) + theta * b / (wide + 1e-7)) * (long + wide) / 2, -clip, clip)


def drawn(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bound", "clip"), [(5.0, 0.1), (5.0, 9.0), (0.3, 9.0)])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (6, 5)])
def test_the_mix_of_two_updates_by_hand(shape, bound, clip):
    a, b = drawn(*shape, scale=0.1, seed=1), drawn(*shape, scale=0.02, seed=2)
    found = crossed(a, b, bound, clip)
    if len(shape) == 2:
        expected = by_hand(a, b, bound, clip)
    else:
        expected = np.stack([[by_hand(a[o, i], b[o, i], bound, clip) for i in range(3)] for o in range(4)])
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-4, atol=1e-6)


def test_equal_updates_come_to_twice_themselves_and_a_vanishing_one_halves():
    g = drawn(4, 3, 3, 3)
    torch.testing.assert_close(crossed(g, g, 5.0, 9.0), 2 * g, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(crossed(g, torch.zeros_like(g), 5.0, 9.0), g / 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(crossed(-g, g, 5.0, 9.0), torch.zeros_like(g), rtol=0, atol=1e-5)


def test_what_is_mixed_into_what():
    def name(stage, block, number):
        return f"body.stage{stage}_block{block}.conv{number}.weight"

    net = nets.build("resnet:3", (3, 8, 8), 5)
    expected = {name(s, b, n): name(s, 1, 2) for s in (1, 2, 3) for b in (2, 3) for n in (1, 2)}
    assert references(net) == expected
    chain = nets.build("mlp:7,7,7", (1, 8, 8), 5)
    assert references(chain) == {"body.fc3.weight": "body.fc2.weight"}
    assert references(nets.build("mlp:7,7", (1, 8, 8), 5)) == {}
    assert references(nets.build("mlp:7,7,5,7,7", (1, 8, 8), 5)) == {}, "another stage has a matrix of that shape"


def shallow(net, depth):
    """The network of a depth, put together without the library."""
    net.body = nn.Sequential(*list(net.body)[: 2 + depth])
    return net


def place(name):
    """Where a parameter of the toy's network stands: its depth; 1 for what all have."""
    return max(1, int(name.split(".")[1]) - 1) if name.startswith("body") else 1


@pytest.mark.parametrize("cross", [True, False])
def test_a_round_by_hand(cross):
    task = Toy((16, 40, 24, 31, 12, 19), **DEEP)
    method = InCo(0.2, epochs=2, batch=8, cross=cross, clip=0.02)
    made = ran(method, task, rounds=1)
    start = dict(network(task, made.site.initial).named_parameters())
    moved = {}
    for k in range(6):
        depth = 1 + k % 3
        own = shallow(network(task, made.site.initial), depth)
        after = descended(own, task, list(node(made.site, k).batches(8, 2)), 0.2)
        for name, value in after.named_parameters():
            moved.setdefault(name, []).append((value - start[name]).detach())
    g = {name: sum(updates) / len(updates) for name, updates in moved.items()}
    assert [len(moved[name]) for name in (FIRST, SECOND, THIRD)] == [6, 4, 2]
    if cross:
        mixed = {name: torch.tensor(by_hand(g[name], g[FIRST], clip=0.02)).float() for name in (SECOND, THIRD)}
        assert all((mixed[name] - g[name]).norm() > 0.1 * g[name].norm() for name in mixed)
        g |= mixed
    for name, update in g.items():
        torch.testing.assert_close(made.server.model[name], start[name].detach() + update, rtol=0, atol=2e-6)


def test_clients_of_one_depth_without_cross_are_fedavg_with_equal_weights():
    for norm in (False, True):
        task = Toy((16,) * 4, norm, **DEEP)
        one, other = (ran(method, task, rounds=3) for method in (InCo(depths=(3,), cross=False), FedAvg()))
        assert torch.equal(one.server.model.flat, other.server.model.flat)


def sent(made, way, client=None, round=1):
    """The training messages of a round in one direction, those of one client or all."""
    lines = [x for x in made.record.ledger if (x["direction"], x["kind"], x["round"]) == (way, "train", round)]
    return [line for line in lines if client is None or client in line["clients"]]


def test_first_blocks_the_head_and_all_vectors_are_bitwise_as_without_cross_and_so_are_the_bytes():
    task = Toy((30, 20, 25, 35, 22, 28), **DEEP)
    plain, mixed = (ran(InCo(0.2, cross=cross), task, rounds=1) for cross in (False, True))
    same = {name for name in plain.server.model if torch.equal(plain.server.model[name], mixed.server.model[name])}
    assert set(plain.server.model) - same == {SECOND, THIRD}
    for way in ("up", "down"):
        sizes = [[line["bytes"] for line in sent(made, way)] for made in (plain, mixed)]
        assert sizes[0] == sizes[1] and sizes[0]


def test_what_nobody_of_a_cohort_has_stays_bitwise():
    task, seen = Toy((30, 20, 25, 35, 22, 28), **DEEP), set()
    runs = [ran(InCo(0.2), task, rounds=rounds, cohort=1) for rounds in range(1, 6)]
    models = [runs[0].site.initial, *(made.server.model for made in runs)]
    for round, (before, after) in enumerate(pairwise(models), start=1):
        (asked,) = {k for line in sent(runs[-1], "up", round=round) for k in line["clients"]}
        stayed = {name for name in after if torch.equal(after[name], before[name])}
        assert stayed == {name for name in after if place(name) > 1 + asked % 3}
        seen.add(asked % 3)
    assert len(seen) > 1


def test_a_clients_messages_are_as_large_as_its_network():
    made = ran(InCo(), Toy((30, 20, 25), **DEEP), rounds=1)
    model = made.server.model
    sizes = [4 * len(model.select(*(name for name in model if place(name) <= depth))) for depth in (1, 2, 3)]
    for way, others in (("up", 300), ("down", 250)):  # names and shapes beside the numbers
        found = [sum(line["bytes"] for line in sent(made, way, k)) for k in range(3)]
        assert all(size <= one < size + others for size, one in zip(sizes, found, strict=True))
        assert found == sorted(set(found))


def test_every_depth_is_judged_and_every_client_by_its_own():
    task = Toy((30, 20, 25, 35), **DEEP)
    made = ran(InCo(0.2), task, rounds=2)
    final = made.record.final
    for depth in (1, 2, 3):
        expected = task.judge(shallow(network(task, made.server.model), depth).eval(), task.global_test())
        assert final[f"global_test_loss@depth{depth}"] == pytest.approx(expected["loss"], rel=1e-5)
    assert final["global_test_loss"] == final["global_test_loss@depth3"]
    nets = [shallow(network(task, made.server.model), 1 + k % 3).eval() for k in range(4)]
    own = [task.judge(net, task.data(k, "test")) for k, net in enumerate(nets)]
    accuracy = sum(one["n"] * one["accuracy"] for one in own) / sum(one["n"] for one in own)
    assert final["personal_test_accuracy"] == pytest.approx(accuracy)
    assert made.method.predict(node(made.site, 1), made.server.nets["depth2"]) is made.server.nets["depth2"]
    assert made.method.predict_message(made.server, made.everybody)["model"][1].layout.names == tuple(
        name for name in made.server.model if place(name) < 3
    )
    assert "global_test_loss@depth3" not in ran(InCo(depths=(3,)), task, rounds=1).record.final


@pytest.mark.parametrize("depths", [(0, 3), (1, 2), (1, 4)])
def test_depths_that_do_not_fit_the_network_are_refused(depths):
    with pytest.raises(UsageError, match=r"inco.depths are .*; each must be at least 1, and the largest 3"):
        ran(InCo(depths=depths), Toy(**DEEP), rounds=1)


def test_a_network_in_which_nothing_would_be_mixed_is_refused():
    with pytest.raises(UsageError, match="matrices of one shape in two blocks of a stage, and this network has none"):
        ran(InCo(), Chain(), rounds=1)
    ran(InCo(cross=False), Chain(), rounds=1)
    with pytest.raises(UsageError, match="inco needs a network with a stage of several blocks; take resnet:3"):
        ran(InCo(cross=False), Chain("mlp:8,4"), rounds=1)


class Chain(Toy):
    def __init__(self, model="mlp:8,8"):
        super().__init__()
        self.model = model

    def network(self):
        return self.build(self.model)
