"""FedProx: the proximal point, and the stragglers' partial work."""

from collections import Counter

import pytest
import torch
from problems import Quadratics, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.random import stream
from fedloom.tasks.toy import Toy


def test_many_local_steps_reach_the_proximal_point():
    task, distances = Quadratics(sizes=(5,)), []
    for mu in (0.0, 0.3, 2.0):
        w = ran(FedProx(lr=0.2, epochs=150, batch=0, mu=mu), task, rounds=1).server.model.flat
        damped = task.curvatures[0] + mu * torch.eye(2, dtype=torch.float64)
        # argmin f(v) + mu/2 |v - w0|^2 from w0 = 0
        point = torch.linalg.solve(damped, task.curvatures[0] @ task.centers[0])
        assert torch.allclose(w, point, rtol=0, atol=1e-9)
        distances.append(w.norm())
    assert distances == sorted(distances, reverse=True)


def test_the_anchor_stays_where_the_round_began():
    task, lr, mu = Quadratics(sizes=(5,)), 0.1, 0.5
    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(2):
        v = w
        for _ in range(3):
            v = v - lr * (task.gradient(0, v) + mu * (v - w))
        w = v
    got = ran(FedProx(lr=lr, epochs=3, batch=0, mu=mu), task, rounds=2).server.model.flat
    assert torch.allclose(got, w, rtol=0, atol=1e-12)


def test_clients_count_by_their_samples():
    task, lr, mu = Quadratics(sizes=(2, 6)), 0.1, 0.5
    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(2):
        reached = []
        for k in range(2):
            v = w
            for _ in range(3):
                v = v - lr * (task.gradient(k, v) + mu * (v - w))
            reached.append(v)
        w = (2 * reached[0] + 6 * reached[1]) / 8
    got = ran(FedProx(lr=lr, epochs=3, batch=0, mu=mu), task, rounds=2).server.model.flat
    assert torch.allclose(got, w, rtol=0, atol=1e-12)


def test_stragglers_do_one_to_all_but_one_epochs():
    method = FedProx(epochs=5, stragglers=0.5)
    epochs = Counter(method.affordable(stream(0, "draw", nth)) for nth in range(4000))
    assert set(epochs) == {1, 2, 3, 4, 5}
    assert epochs[5] == pytest.approx(2000, abs=150)
    assert all(epochs[e] == pytest.approx(500, abs=100) for e in (1, 2, 3, 4))


def test_stragglers_that_could_not_do_less_are_refused():
    with pytest.raises(UsageError, match=r"stragglers is 0.5 and epochs 1, of which nobody can do fewer"):
        FedProx(stragglers=0.5)
    with pytest.raises(UsageError, match=r"stragglers is 1.5; it is a share"):
        FedProx(stragglers=1.5, epochs=2)


def test_the_partial_work_of_stragglers_is_kept():
    all_slow = ran(FedProx(epochs=4, batch=0, stragglers=1.0), Toy(), rounds=1).record.metrics[0]
    assert all_slow["replies"] == 4
    assert 4 <= all_slow["gradient_steps"] <= 12  # nobody managed the fourth epoch


def test_it_sends_what_fedavg_sends_and_clients_remember_nothing():
    prox, plain = (ran(method(), Toy(), rounds=2) for method in (FedProx, FedAvg))
    assert list(prox.record.ledger) == list(plain.record.ledger)
    assert not any(prox.engine.states.values())
