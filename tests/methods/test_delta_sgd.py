"""Delta-SGD as a method: the rule of `tests/test_optimizers.py` in every client's every round."""

import pytest
import torch
from problems import Quadratics, ran

import fedloom
from fedloom.errors import UsageError
from fedloom.methods.optimize.delta_sgd import DeltaSGD
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace


def test_it_is_fedavg_with_the_rule_as_a_setting():
    own = trace(Lab(DeltaSGD).experiment(Toy((9, 20, 14))))
    fields = DeltaSGD().fields()
    asked = ran(
        FedAvg(lr=fields["lr"]), Toy((9, 20, 14)), rounds=len(own["metrics"]), optimizer="delta_sgd:gamma=2,delta=0.1"
    )
    assert difference(own["server"], dict(asked.server.values)) is None


@pytest.mark.parametrize(("lr", "batch", "steps"), [(0.05, 2, 2), (0.05, 1, 4), (0.5, 1, 4)])
def test_rounds_by_hand_begin_anew_and_clients_of_other_curvature_step_differently(lr, batch, steps):
    task = Quadratics(sizes=(4, 4))
    made = ran(DeltaSGD(lr, 1, batch, gamma=1.2, delta=0.4, eps=1e-4), task, rounds=3)
    x, last = torch.zeros(2, dtype=torch.float64), []
    for _ in range(3):
        reached, last = [], []
        for k in range(2):
            y = before = x
            eta, theta = lr, 1.0
            for step in range(steps):
                g = task.gradient(k, y)
                if step:
                    turned = (g - task.gradient(k, before)).norm()
                    new = min(1.2 * (y - before).norm() / (2 * turned), (1 + 0.4 * theta) ** 0.5 * eta) + 1e-4
                    theta, eta = new / eta, new
                before, y = y, y - eta * g
            reached.append(y)
            last.append(float(eta))
        x = sum(reached) / 2
    assert torch.allclose(made.server.model.flat, x, rtol=0, atol=1e-12)


def test_whatever_the_first_step_was_it_settles_within_the_bound_of_the_curvature():
    """With steps that plain descent does not survive, at curvatures up to 3.6, its rounds stay bounded."""
    task = Quadratics()
    assert ran(FedAvg(1.5, epochs=6, batch=0), task, rounds=15).server.model.norm() > 1e3
    made = ran(DeltaSGD(1.5, epochs=6, batch=0), task, rounds=15)
    assert (made.server.model.flat - task.optimum([1, 3])).norm() < 5


def test_without_growth_and_bound_it_is_fedavg():
    task = Toy((9, 20, 14))
    loose = ran(DeltaSGD(0.02, gamma=1e12, delta=0.0, eps=0.0), task, rounds=3)
    plain = ran(FedAvg(0.02), task, rounds=3)
    torch.testing.assert_close(loose.server.model.flat, plain.server.model.flat, rtol=1e-5, atol=1e-6)


def test_no_step_size_leaves_a_client():
    made = ran(DeltaSGD(), Toy(), rounds=2)
    assert {line["field"] for line in made.record.ledger if line["direction"] == "up" and line["kind"] == "train"} <= {
        "delta",
        "n",
        "envelope",
    }


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"optimizer": "adam"}, "it is one; take fedavg with optimizer=delta_sgd"),
        ({"dp": "sample:noise=1.0,clip=1.0"}, "a second gradient of every batch"),
    ],
)
def test_what_it_refuses(settings, why):
    with pytest.raises(UsageError, match=why):
        fedloom.run("delta_sgd", Toy(), rounds=1, **settings)
