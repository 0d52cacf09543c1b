"""FedAsync: the mixture at each arrival, the three weights of old work, and the pull."""

import pytest
import torch
from arrivals import by_hand, trained
from problems import Quadratics, ran

from fedloom.methods.asynchronous.fedasync import FedAsync
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.tasks.toy import Toy

ONE = Toy(sizes=(25,))
WEIGHTS = {
    "constant": lambda s: 1.0,
    "polynomial": lambda s: (1 + s) ** -0.5,
    "hinge": lambda s: 1.0 if s <= 1 else 1 / (10 * (s - 1) + 1),
}


@pytest.mark.parametrize("staleness", WEIGHTS)
def test_the_model_is_that_of_a_queue_by_hand(staleness):
    task, lr, alpha, rounds = Quadratics((2, 7)), 0.1, 0.6, 9
    made = ran(FedAsync(lr=lr, epochs=1, batch=1, rho=0.0, alpha=alpha, staleness=staleness, b=1.0), task, rounds)
    models, stale = [torch.zeros(2, dtype=torch.float64)], []
    for [(c, s)] in by_hand([2.0, 7.0], rounds):
        share = alpha * WEIGHTS[staleness](s)
        w = trained(task, c, models[len(models) - 1 - s], lr, [2, 7][c])
        models.append((1 - share) * models[-1] + share * w)
        stale.append(float(s))
    assert max(stale) >= 3
    assert [row["server/staleness"] for row in made.record.metrics] == stale
    assert torch.allclose(made.server.model.flat, models[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_one_client_that_replaces_the_model_is_fedavg_or_fedprox(rho):
    made = ran(FedAsync(alpha=1.0, rho=rho, lr=0.1, epochs=2), ONE, 3)
    other = FedProx(mu=rho, lr=0.1, epochs=2) if rho else FedAvg(lr=0.1, epochs=2)
    assert torch.allclose(made.server.model.flat, ran(other, ONE, 3).server.model.flat, rtol=0, atol=3e-6)
    free = ran(FedAsync(alpha=1.0, rho=0.0, lr=0.1, epochs=2), ONE, 3)
    assert torch.equal(made.server.model.flat, free.server.model.flat) == (rho == 0)


def test_the_fast_are_heard_more_often():
    made = ran(FedAsync(), Toy(sizes=(10, 10, 40)), 12)
    ups = [line["clients"] for line in made.record.ledger if line["direction"] == "up" and line["field"] == "model"]
    heard = [client for clients in ups for client in clients]
    assert [heard.count(client) for client in range(3)] == [6, 5, 1]
    assert sum(row["virtual_seconds"] for row in made.record.metrics) == pytest.approx(0.02 * 6)


def test_a_lost_model_changes_nothing():
    made = ran(FedAsync(), Toy(), 5, lost=1.0)
    assert torch.equal(made.server.model.flat, made.site.initial.flat)
