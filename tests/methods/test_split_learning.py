"""Split learning: descent on the joint network, features and gradients on the wire."""

import pytest
import torch
from problems import ran
from torch import nn
from torch.nn import functional as F

from fedloom.methods.structure.split_learning import SplitLearning
from fedloom.node import Server
from fedloom.site import Site
from fedloom.task import Data
from fedloom.tasks.vertical import toy


class Joint(nn.Module):
    """All parties' bodies and the server's network, in one place."""

    def __init__(self, task, site):
        super().__init__()
        self.bodies = nn.ModuleList()
        for k in range(task.population):
            self.bodies.append(loaded(task.build(f"party:{k}"), site.network(f"party:{k}")).body)
        self.top = loaded(task.network(), site.initial)

    def forward(self, parts):
        return self.top(torch.cat([body(x) for body, x in zip(self.bodies, parts, strict=True)], 1))


def loaded(net, w):
    net.load_state_dict({name: w[name].clone() for name in w}, strict=False)
    return net


def centralised(task, method, rounds):
    """The joint network after torch's own SGD on the batches that the server draws."""
    site = Site(task, seed=0)
    net, server = Joint(task, site).train(), Server(site, task.population)
    optimizer = torch.optim.SGD(net.parameters(), lr=method.lr, momentum=method.momentum)
    places = Data(torch.arange(len(task.labels)), task.labels)
    for round in range(1, rounds + 1):
        server.begin("train", round)
        for rows, y in server.batches(method.batch, method.epochs, data=places):
            optimizer.zero_grad()
            F.cross_entropy(net([task.data(k, "train").x[rows] for k in range(task.population)]), y).backward()
            optimizer.step()
    return net.eval()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_descent_on_the_joint_network(momentum, norm):
    task, method = toy(norm=norm), SplitLearning(lr=0.1, momentum=momentum, epochs=2, batch=10)
    made, net = ran(method, task, 3), centralised(task, method, 3)
    for k in range(4):
        w = made.engine.states[k]["model"]
        for name, value in net.bodies[k].state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(w[f"body.{name}"], value, rtol=1e-4, atol=1e-5)
        assert (w - made.site.network(f"party:{k}")).norm() > 0.05
    for name, value in net.top.state_dict().items():
        torch.testing.assert_close(made.server.model[name], value, rtol=1e-4, atol=1e-5)
    right = net([part[task.test] for part in task.parts]).argmax(1) == task.truth[task.test]
    assert made.record.final["global_test_accuracy"] == pytest.approx(right.double().mean().item())


def test_two_features_a_sample_cross_in_an_epoch():
    made = ran(SplitLearning(epochs=3, batch=12), toy(), 2)
    lines = [line for line in made.record.ledger if line["kind"] == "train"]
    sums = dict.fromkeys(("features", "pull", "rows"), 0)
    for line in lines:
        if line["field"] in sums:
            sums[line["field"]] += line["bytes"] * len(line["clients"])
    messages = 6 * 3 * 4
    for name in ("features", "pull"):
        assert 6 * 36 * 32 * 4 < sums[name] < 6 * 36 * 32 * 4 + messages * 60
    assert 2 * 6 * 36 * 4 * 4 < sums["rows"] < 2 * 6 * 36 * 4 * 4 + 2 * messages * 60
    assert {line["field"] for line in lines} == {*sums, "envelope"}, "no labels, no inputs, no weights"


def test_a_silent_party_counts_as_zeros():
    task = toy()
    made = ran(SplitLearning(), task, 6, cohort=1)
    assert made.record.final["global_test_accuracy"] > 0.5
    seen = set(made.server.parties)
    assert seen == set(made.engine.states) and 1 < len(seen) <= 4
    gone = ran(SplitLearning(), task, 2, lost=1.0)
    assert torch.equal(gone.server.model.flat, gone.site.initial.flat) and gone.server.parties == []
