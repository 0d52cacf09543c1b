"""FedJETs: a gate that sends every input to one of a few experts."""

import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.personalize._experts import Gate, mixed, routed, unlike
from fedloom.methods.personalize.fedjets import FedJETs
from fedloom.node import Client
from fedloom.task import Batch
from fedloom.tasks.toy import Toy


def test_one_expert_without_pretraining_or_anchor_is_fedavg():
    """Of all samples at once: the calls before training move the draw of batches on."""
    alone = FedJETs(0.1, batch=0, experts=1, chosen=1, anchors=False, common_epochs=0)
    made, plain = ran(alone, Toy(), rounds=3), ran(FedAvg(0.1, batch=0), Toy(), rounds=3)
    torch.testing.assert_close(made.server.experts[0].flat, plain.server.model.flat, rtol=1e-4, atol=1e-6)
    assert torch.equal(made.server.common.flat, made.site.initial.flat)


def nets(experts=3):
    draw = torch.Generator().manual_seed(0)
    made = ran(FedAvg(), Toy(), rounds=1)
    start = made.site.initial
    given = [start + 0.5 * type(start)(torch.randn(len(start), generator=draw), start.layout) for _ in range(experts)]
    gate = made.site.network(Gate, 8, 4, experts)
    return made, start, given, gate + 0.5


def test_the_mixtures_loss_by_hand():
    made, common, experts, gate = nets()
    client = node(made.site, 0)
    x, y = client.data.all()
    with torch.no_grad():
        scores = client.net(gate)(client.net(common).body(x))
        for chosen in ([0, 2], [2, 1], [1]):
            shares = scores[:, chosen].softmax(1)
            outputs = [client.net(experts[e])(x).softmax(1) for e in chosen]
            whole = sum(shares[:, k : k + 1] * one for k, one in enumerate(outputs))
            expected = -whole[torch.arange(len(y)), y].log().mean()
            given = {f"expert{e}": client.net(experts[e]) for e in chosen}
            loss = mixed({"common": client.net(common), "gate": client.net(gate), **given}, Batch(x, y))
            torch.testing.assert_close(loss, expected)


def test_an_anchor_learns_its_expert_and_teaches_the_gate_and_nothing_else_moves():
    made, common, experts, gate = nets()
    method = FedJETs(0.3, batch=0, experts=3, lam=0.7, common_epochs=0)
    client = node(made.site, 0)
    x, y = client.data.all()
    reply = method.local(client, {"expert1": experts[1]}, gate, common, 1)
    expert, net = client.net(experts[1]).requires_grad_(True), client.net(gate).requires_grad_(True)
    with torch.no_grad():
        features = client.net(common).body(x)
    value = F.cross_entropy(expert(x), y) + 0.7 * F.cross_entropy(net(features), torch.full_like(y, 1))
    for trained, found in ((expert, reply["experts"]["expert1"]), (net, reply["gate"])):
        slope = torch.autograd.grad(value, list(trained.parameters()), retain_graph=True)
        for g, name in zip(slope, [n for n, _ in trained.named_parameters()], strict=True):
            torch.testing.assert_close(found[name], -0.3 * g, rtol=1e-4, atol=1e-6)
    assert set(reply) == {"experts", "gate", "n"} and set(reply["experts"]) == {"expert1"}


def test_a_client_trains_the_experts_that_the_gate_gives_most_of_its_data():
    made, common, _, gate = nets(5)
    for k in range(4):
        client = node(made.site, k)
        shares = client.net(gate)(client.features(common, client.data.x)).softmax(1).mean(0).tolist()
        order = FedJETs(chosen=3).route(client, gate, common)["order"]
        assert order == sorted(range(5), key=lambda e: -shares[e])[:3]
    assert FedJETs().with_anchor([4, 2], None) == [4, 2] and FedJETs().with_anchor([4, 2], 0) == [0]


def test_every_input_is_judged_by_the_expert_that_the_gate_prefers():
    made, common, experts, gate = nets()
    client = node(made.site, 0)
    x = made.server.task.global_test().x
    scores = routed(client, experts, gate, common)(x)
    chosen = client.net(gate)(client.net(common).body(x)).argmax(1)
    for row, e in enumerate(chosen.tolist()):
        torch.testing.assert_close(scores[row], client.net(experts[e])(x[row : row + 1])[0])


def test_anchors_are_those_whose_labels_overlap_least():
    shares = {0: [0.5, 0.5, 0.0], 1: [0.0, 0.1, 0.9], 2: [1.0, 0.0, 0.0], 5: [0.0, 1.0, 0.0], 7: [1.0, 0.0, 0.0]}
    shares = {k: torch.tensor(h) for k, h in shares.items()}
    assert unlike(shares, 3) == {2: 0, 1: 1, 5: 2}
    assert unlike({4: torch.tensor([1.0])}, 3) == {4: 0}


def test_experts_that_nobody_trains_and_the_common_one_stay_and_each_is_averaged_over_its_trainers():
    task = Toy((20, 30, 25))
    before, after = (ran(FedJETs(0.1, experts=6, chosen=1, anchors=False), task, rounds=n) for n in (1, 2))
    moved = [not torch.equal(a.flat, b.flat) for a, b in zip(before.server.experts, after.server.experts, strict=True)]
    assert 1 <= sum(moved) <= 3 and torch.equal(before.server.common.flat, after.server.common.flat)
    method, server = before.method, before.server
    found = {}
    for k in range(3):
        (e,) = method.route(node(before.site, k), server.gate, server.common)["order"]
        client = Client(before.site, k, {}, "train", 2, 1)
        reply = method.local(client, {f"expert{e}": server.experts[e]}, server.gate, server.common, -1)
        found.setdefault(e, []).append((client.n, reply["experts"][f"expert{e}"]))
    for e, replies in found.items():
        mean = sum(n * delta.flat for n, delta in replies) / sum(n for n, _ in replies)
        torch.testing.assert_close(after.server.experts[e].flat, server.experts[e].flat + mean, rtol=1e-4, atol=1e-6)


def test_the_common_expert_goes_down_in_full_once():
    made = ran(FedJETs(experts=5, chosen=2, anchors=False), Toy(), rounds=3)
    down = [line for line in made.record.ledger if line["direction"] == "down" and line["kind"] == "train"]
    size = 4 * len(made.site.initial)
    common = {
        round: sum(x["bytes"] * len(x["clients"]) for x in down if x["field"] == "common" and x["round"] == round)
        for round in (1, 2, 3)
    }
    assert 4 * size < common[1] < 4 * size + 400 and common[2] == common[3] < 400
    models = [x["bytes"] for x in down if x["field"].startswith("models")]
    assert models and max(models) < 2 * size + 200, "K experts, never all"


def test_it_learns():
    made = ran(FedJETs(0.3, epochs=3, experts=3, chosen=1, common_epochs=10), Toy((60, 60, 60)), rounds=12)
    assert made.record.metrics[-1]["global_test_accuracy"] > 0.85
    assert len(made.server.anchors) == 3


def test_more_experts_to_train_than_there_are_is_refused():
    with pytest.raises(UsageError, match=r"fedjets.chosen is 3, of 2 experts"):
        FedJETs(experts=2, chosen=3)
