"""FedBN: BatchNorm layers stay at home, and nothing else does."""

from itertools import combinations

import torch
from problems import averaged_by_hand, close, node, ran

from fedloom import encoding
from fedloom.methods.personalize.fedbn import FedBN
from fedloom.tasks.toy import Toy

NORMS = ("body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var")


def test_is_averaging_by_hand_around_each_clients_own_batchnorm():
    task = Toy(norm=True)
    made = ran(FedBN(lr=0.1, epochs=2), task, rounds=3)
    for k, held in enumerate(averaged_by_hand(task, 3, lr=0.1, epochs=2, batch=10, kept="body.1.")):
        client = node(made.site, k)
        client.state = made.engine.states[k]
        assert close(made.method.predict(client, made.server.shared), held)


def test_batchnorm_never_crosses():
    made = ran(FedBN(), Toy(norm=True), rounds=2)
    assert set(made.server.shared) == set(made.server.model) - set(NORMS)
    sent = {line["field"]: line["bytes"] for line in made.record.ledger if line["kind"] == "train"}
    assert sent.keys() == {"shared", "delta", "n", "envelope"}
    for field in ("shared", "delta"):
        assert sent[field] == encoding.sizes({field: made.server.shared})[field]
    assert all(torch.equal(made.server.model[name], made.site.initial[name]) for name in NORMS)


def test_every_client_has_statistics_of_its_own():
    states = ran(FedBN(), Toy(norm=True), rounds=2).engine.states
    assert all(set(state["norms"]) == set(NORMS) for state in states.values())
    for a, b in combinations(states.values(), 2):
        assert all(not torch.equal(a["norms"][name], b["norms"][name]) for name in NORMS)


def test_a_client_that_was_never_asked_predicts_with_the_initial_batchnorm():
    made = ran(FedBN(), Toy(norm=True), rounds=1)
    judged = made.method.predict(node(made.site, 0), made.server.shared)
    assert torch.equal(judged.flat, made.site.initial.merge(made.server.shared).flat)
