"""FedExP: how far the server goes, and which model is judged."""

import math

import numpy as np
import pytest
import torch
from problems import Quadratics, node, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedexp import FedExP
from fedloom.runs.evaluation import evaluate
from fedloom.tasks.toy import Toy


@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_the_server_goes_as_far_as_the_box_says(epsilon):
    task, lr = Quadratics(), 0.05
    w, shares, rates, models = np.zeros(2), np.array([4, 12]) / 16, [], [np.zeros(2)]
    for _ in range(4):
        deltas = np.stack([-lr * task.gradient(k, torch.from_numpy(w)).numpy() for k in range(2)])
        mean = shares @ deltas
        rates.append(max(1.0, shares @ (deltas**2).sum(1) / (2 * (mean @ mean + epsilon))))
        w = w + rates[-1] * mean
        models.append(w)
    made = ran(FedExP(lr=lr, batch=0, epsilon=epsilon), task, rounds=4)
    assert made.server.model.flat.numpy() == pytest.approx(w, abs=1e-12)
    assert made.server.average.flat.numpy() == pytest.approx((models[-1] + models[-2]) / 2, abs=1e-12)
    assert made.record.metrics[-1]["server/rate"] == pytest.approx(rates[-1])
    assert (epsilon > 0.1) == all(rate == 1 for rate in rates), "with a small one it goes beyond the mean"


@pytest.mark.parametrize("count", [2, 3, 6])
def test_orthogonal_updates_go_half_as_far_as_there_are_clients(count, monkeypatch):
    made = ran(FedExP(lr=0.1, batch=0, epsilon=1e-12), Quadratics(), rounds=1)
    monkeypatch.setattr(type(made.server), "log", lambda self, **logs: self.__dict__.setdefault("told", logs))

    class Cohort:
        def mean(self, function, weight, model):
            flat = torch.zeros(2, dtype=torch.float64)
            flat[0] = 1 / math.sqrt(count)  # the mean of `count` orthogonal updates of length one
            return type("Up", (), {"delta": type(model)(flat, model.layout), "square": 1.0})

    FedExP(epsilon=1e-12).round(made.server, Cohort())
    assert made.server.told["rate"] == pytest.approx(max(1.0, count / 2), abs=1e-9)


@pytest.mark.parametrize("world", [{}, {"lost": 0.4}, {"cohort": 2}])
def test_with_a_large_epsilon_the_model_is_that_of_fedavg(world):
    here, there = (ran(m, Toy(norm=True), 4, **world) for m in (FedExP(epsilon=1e9), FedAvg()))
    assert torch.equal(here.server.model.flat, there.server.model.flat)


def test_equal_updates_are_plain_averaging():
    task = Toy(sizes=(30, 30, 30))
    task.data = lambda client, split, data=task.data: data(0, split)  # all have the rows of the first
    here, there = (ran(m, task, 3) for m in (FedExP(batch=0), FedAvg(batch=0)))
    assert torch.allclose(here.server.model.flat, there.server.model.flat, rtol=0, atol=1e-6)


def test_the_length_is_that_of_the_parameters():
    made = ran(FedExP(), Toy(norm=True), rounds=1)
    reply = FedExP().local(node(made.site, 1, round=2), made.server.model)
    assert reply["square"] == pytest.approx(reply["delta"].params.flat.double().square().sum().item(), rel=1e-5)
    assert reply["n"] == 20


def test_statistics_go_with_the_mean_and_the_mean_of_the_last_two_is_judged():
    made = ran(FedExP(epsilon=1e-9), Toy(norm=True), rounds=3)
    server = made.server
    assert made.record.metrics[-1]["server/rate"] > 1
    assert torch.equal(server.average.buffers.flat, server.model.buffers.flat)
    assert not torch.equal(server.average.params.flat, server.model.params.flat)
    row, _, _ = evaluate(made, 3)
    assert row["global_test_loss"] == pytest.approx(server.evaluate(server.average)["loss"])
    assert row["global_test_loss"] != pytest.approx(server.evaluate(server.model)["loss"])
    plain, farther = (ran(m, Toy(norm=True), rounds=1).server.model for m in (FedAvg(), FedExP(epsilon=1e-9)))
    assert torch.equal(farther.buffers.flat, plain.buffers.flat)
    assert not torch.equal(farther.params.flat, plain.params.flat)
    first = ran(FedExP(epsilon=1e9), Toy(norm=True), rounds=1).server
    assert torch.equal(first.average.flat, plain.flat), "after one round there is one"
    assert FedExP().predict(node(made.site, 0), server.average) is server.average


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match=r"fedexp\.epsilon is 0"):
        FedExP(epsilon=0.0)
