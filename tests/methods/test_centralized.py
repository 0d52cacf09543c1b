"""Centralized training against a loop of torch's own, and what it costs."""

import torch
from problems import Quadratics, close, descended, network, ran

from fedloom import encoding
from fedloom.methods.optimize.centralized import Centralized
from fedloom.node import Server
from fedloom.task import Data
from fedloom.tasks.toy import Toy


def test_is_a_loop_of_torchs_sgd_over_the_pooled_data():
    task = Toy(norm=True)
    made = ran(Centralized(lr=0.1, epochs=2), task, rounds=3)
    own = [task.data(k, "train") for k in range(task.population)]
    pooled = Data(torch.cat([data.x for data in own]), torch.cat([data.y for data in own]))
    net, server = network(task, made.site.initial), Server(made.site, task.population)
    for round in (1, 2, 3):
        server.begin("train", round)  # for the same order of samples
        batches = list(server.batches(10, epochs=2, data=pooled))
        assert sum(map(len, batches)) == 2 * 110
        net = descended(net, task, batches, lr=0.1)
    assert close(made.server.model, net.state_dict())


def test_it_reaches_the_optimum_of_the_pooled_data():
    task = Quadratics(noise=0.5)
    w = ran(Centralized(lr=0.3, epochs=80, batch=0), task, rounds=1).server.model.flat
    assert torch.allclose(w, task.optimum(task.sizes), rtol=0, atol=1e-9)


def test_the_ledger_and_the_privacy_statement_tell_of_the_raw_data():
    task = Toy()
    made = ran(Centralized(), task, rounds=1)
    sent = {(line["field"], k): line["bytes"] for line in made.record.ledger for k in line["clients"]}
    for k in range(task.population):
        data = task.data(k, "train")
        assert sent["x", k] == encoding.sizes({"x": data.x})["x"] > data.x.numel() * 4
        assert sent["y", k] == encoding.sizes({"y": data.y})["y"] > data.y.numel() * 8
    assert made.record.manifest["privacy"] == [{"verb": "call", "function": "share", "fields": ["x", "y"]}]


def test_who_takes_part_or_fails_in_a_round_changes_nothing():
    plain = ran(Centralized(), Toy(), rounds=2).server.model.flat
    for fate in ({"cohort": 1}, {"lost": 1.0}, {"dropout": 1.0}):
        assert torch.equal(ran(Centralized(), Toy(), rounds=2, **fate).server.model.flat, plain)
