"""FedLwF: the old model's answers to new samples."""

from dataclasses import dataclass

import pytest
import torch
from problems import network, node, ran
from torch.nn import functional as F

import fedloom
from fedloom.errors import UsageError
from fedloom.methods.continual.fedlwf import FedLwF
from fedloom.methods.continual.target import TARGET
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.runs.continual import continual
from fedloom.tasks.stream import SixClouds, Stream
from fedloom.tasks.toy import Toy
from fedloom.world import World

TOY = Stream(SixClouds(Toy()), 2, 2, known=False)


@dataclass(frozen=True)
class Alike(FedAvg):
    """FedAvg in which all clients count alike."""

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta


def test_the_first_task_is_averaging_and_without_distillation_it_is_target_bitwise():
    one, plain = (ran(method, TOY, 2).server.model.flat for method in (FedLwF(), Alike()))
    assert torch.equal(one, plain)
    one, other = (ran(method, TOY, 4).server for method in (FedLwF(kd=0), TARGET(kd=0)))
    assert torch.equal(one.model.flat, other.model.flat) and one.old is None
    assert not torch.equal(one.model.flat, ran(FedLwF(), TOY, 4).server.model.flat)


def test_a_client_by_hand():
    method, made = FedLwF(lr=0.1, epochs=2, batch=7, kd=4.0), ran(FedLwF(), TOY, 2)
    old = made.server.model
    model = old + 0.1 * made.site.initial
    delta = method.local(node(made.site, 1, round=3), model, old)["delta"]
    net, teacher, before = network(TOY.at(3), model), network(TOY.at(3), old).eval(), torch.tensor([1, 2, 4])
    mask = torch.zeros(6).index_fill(0, before, float("-inf"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in list(node(made.site, 1, round=3).batches(7, 2)):
        soft = (teacher(x).detach()[:, before] / 2).softmax(1)
        kd = -(soft * (net(x)[:, before] / 2).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        (F.cross_entropy(net(x) + mask, y) + 4.0 * kd).backward()
        optimizer.step()
    for name in delta:
        torch.testing.assert_close((model + delta)[name], net.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_old_model_is_of_the_end_of_the_last_task_and_is_sent_once():
    three = Stream(SixClouds(Toy()), 3, 2, known=False)
    ends = [ran(FedLwF(), three, rounds).server.model.flat for rounds in (2, 4)]
    for rounds, end in ((3, ends[0]), (4, ends[0]), (5, ends[1]), (6, ends[1])):
        made = ran(FedLwF(), three, rounds)
        assert torch.equal(made.server.old.flat, end) and made.server.kept == (rounds - 1) // 2
    lines = [line for line in made.record.ledger if line["kind"] == "train" and line["direction"] == "down"]
    assert {line["round"] for line in lines if line["field"].partition(".")[0] == "old"} == {3, 5}


def test_a_task_whose_first_round_nobody_hears_still_has_the_old_model(monkeypatch):
    silent = World.loses
    monkeypatch.setattr(World, "loses", lambda self, round, nth, k: round == 3 or silent(self, round, nth, k))
    lost, on = (ran(FedLwF(), TOY, rounds, lost=1e-9).server for rounds in (3, 4))
    assert lost.kept == 0 and on.kept == 1 and torch.equal(on.old.flat, lost.model.flat)


def test_old_classes_are_kept_where_averaging_forgets_them():
    settings = {"problem": "stream:5,rounds=3,known=false", "rounds": 15, "clients": 5, "partition": "iid"}
    fields = {"lr": 0.1, "epochs": 2}
    mine, plain = (
        continual(fedloom.run(name, report=False, model="mlp:64", fields=fields, eval_every=3, **settings))
        for name in ("fedlwf", "fedavg")
    )
    assert mine["incremental_accuracy"] > plain["incremental_accuracy"] + 0.1
    assert mine["forgetting"] < plain["forgetting"] - 0.3


def test_a_stream_of_missions_is_refused():
    with pytest.raises(UsageError, match="fedlwf needs a problem of the kind stream:by=classes"):
        fedloom.run("fedlwf", problem="stream:5,rounds=1,by=missions", rounds=5, clients=3, report=False)
