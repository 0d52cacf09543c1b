"""FedRep: heads stay, bodies travel, and neither moves while the other learns."""

from itertools import combinations

import pytest
import torch
from problems import close, descended, network, node, ran

from fedloom import encoding
from fedloom.methods.personalize.fedrep import FedRep
from fedloom.node import Client
from fedloom.tasks.toy import Toy


@pytest.mark.parametrize("norm", [False, True])
def test_a_client_trains_its_head_then_the_body(norm):
    task, method = Toy(norm=norm), FedRep(lr=0.1, epochs=2, head_epochs=3)
    made = ran(method, task, rounds=1)
    body, total = made.site.initial.select("body.*"), 0.0
    for k in range(task.population):
        draw = node(made.site, k)
        start = network(task, made.site.initial)
        fitted = descended(start, task, list(draw.batches(10, epochs=3)), lr=0.1, only="head.")
        head = {name: value for name, value in fitted.state_dict().items() if name.startswith("head.")}
        assert close(made.engine.states[k]["head"], head)
        start.load_state_dict(head, strict=False)  # the body's running statistics are the shared ones again
        moved = descended(start, task, list(draw.batches(10, epochs=2)), lr=0.1, only="body.")
        assert all(torch.equal(moved.state_dict()[name], value) for name, value in head.items())
        total = total + torch.cat([moved.state_dict()[name].reshape(-1) for name in body]) * task.sizes[k]
    assert torch.allclose(made.server.body.flat, total / sum(task.sizes), rtol=0, atol=1e-6)


def test_only_the_body_travels():
    made = ran(FedRep(), Toy(), rounds=2)
    assert set(made.server.body) == {"body.0.weight", "body.0.bias"}
    sent = {line["field"]: line["bytes"] for line in made.record.ledger if line["kind"] == "train"}
    assert sent.keys() == {"body", "delta", "n", "envelope"}
    for field in ("body", "delta"):
        assert sent[field] == encoding.sizes({field: made.server.body})[field]
    assert torch.equal(made.server.model.select("head.*").flat, made.site.initial.select("head.*").flat)


def test_every_client_is_judged_with_its_own_head_on_the_shared_body():
    made = ran(FedRep(), Toy(), rounds=2)
    for k, state in made.engine.states.items():
        client = node(made.site, k)
        client.state = state
        judged = made.method.predict(client, made.server.body)
        assert torch.equal(judged.select("head.*").flat, state["head"].flat)
        assert torch.equal(judged.select("body.*").flat, made.server.body.flat)
    for a, b in combinations(made.engine.states.values(), 2):
        assert not torch.equal(a["head"].flat, b["head"].flat)


def test_without_head_epochs_heads_never_move():
    made = ran(FedRep(head_epochs=0), Toy(), rounds=2)
    start = made.site.initial.select("head.*").flat
    assert all(torch.equal(state["head"].flat, start) for state in made.engine.states.values())
    assert not torch.equal(made.server.body.flat, made.site.initial.select("body.*").flat)


def test_a_newcomer_trains_a_head_on_the_shared_body():
    task, method = Toy(newcomers=(20, 24)), FedRep(head_epochs=4)
    made = ran(method, task, rounds=2)
    right = []
    for k in (4, 5):
        late = Client(made.site, k, {}, "evaluate", 2, 1)
        net = network(task, made.site.initial.merge(made.server.body))
        net = descended(net, task, list(late.batches(10, epochs=4)), lr=0.05, only="head.")
        data = task.data(k, "test")
        right.append(float((net.eval()(data.x).argmax(1) == data.y).double().mean()))
    assert made.record.final["newcomer_test_accuracy"] == pytest.approx(sum(right) / 2)
