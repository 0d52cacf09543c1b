"""The membership attack, and the bound beside it."""

import math

import pytest
import torch
from problems import ran

from fedloom.boundary.privacy.base import Privacy
from fedloom.boundary.privacy.membership import attacked, bound
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.random import stream
from fedloom.task import Data
from fedloom.tasks.toy import Toy


def test_the_curve_by_brute_force():
    draw = stream(0, "test")
    members, others = (
        torch.randn(40, generator=draw).round(decimals=1),
        (torch.randn(60, generator=draw) + 1).round(decimals=1),
    )
    found = attacked(members, others)
    wins = sum((m < o) + 0.5 * (m == o) for m in members.tolist() for o in others.tolist())
    assert found.auc == pytest.approx(wins / 2400)
    best = max(
        float((members <= t).double().mean() - (others <= t).double().mean()) for t in torch.cat([members, others])
    )
    assert found.advantage == pytest.approx(best)
    assert attacked(members, members).auc == pytest.approx(0.5) and attacked(members, members).advantage < 1e-9


def test_the_bound_holds_for_randomised_response():
    # Telling the truth with probability p is ln(p / (1 - p)) private: hits p at 1 - p false alarms.
    for p in (0.6, 0.9, 0.99):
        assert bound(math.log(p / (1 - p)), 0.0, 1 - p) == pytest.approx(p)
    assert bound(math.inf, 1e-5) == 1.0 and bound(0.0, 0.0) == pytest.approx(0.01)


def test_delta_adds_to_the_bound_and_few_misses_limit_it_too():
    """Hits h at false alarms a: h <= e^eps a + delta, and 1 - a <= e^eps (1 - h) + delta, solved for h."""
    assert bound(1.0, 0.3, 0.1) == pytest.approx(math.e * 0.1 + 0.3)
    epsilon, delta, alarms = 1.0, 0.1, 0.6
    assert math.exp(epsilon) * alarms + delta > 1
    assert bound(epsilon, delta, alarms) == pytest.approx(1 - (1 - alarms - delta) / math.exp(epsilon))


class Noise(Toy):
    """Labels that only memory can know."""

    def __init__(self):
        super().__init__(sizes=(10,) * 4)
        self.y = torch.randint(3, self.y.shape, generator=stream(0, "labels"))

    def network(self):
        return self.build("mlp:100")  # large enough to remember

    def global_test(self):
        return Data(self.x, self.y, super().global_test().rows)


def test_without_noise_the_attack_succeeds_clearly_more_often():
    method = FedAvg(lr=0.3, epochs=20)
    found = {
        noise: ran(method, Noise(), rounds=15, dp=f"client:noise={noise},clip=10").manifest["membership"]
        for noise in (0, 3)
    }
    assert found[0]["auc"] > 0.7 and found[0]["auc"] > found[3]["auc"] + 0.1
    assert found[0]["bound"] == 1.0 and found[3]["bound"] <= 1.0
    private = ran(FedAvg(), Noise(), rounds=1, dp="client:noise=20,clip=1").manifest["membership"]
    assert private["hits"] <= private["bound"] + 0.1


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"dp": "client:noise=8,clip=1"}, 2),  # a client more or less: a sample of one that stays is out and in again
        ({"dp": "client:noise=8,clip=1", "participation": "poisson", "cohort": 2}, 2),
        ({"dp": "client:noise=20,clip=1", "cohort": 2}, 1),  # one client replaced
        ({"dp": "sample:noise=8,clip=1"}, 1),
        ({"dp": "local:epsilon=0.5,clip=1"}, 1),  # any two replies
    ],
)
def test_the_bound_is_for_one_sample_at_a_client(settings, steps):
    made = ran(FedAvg(), Noise(), rounds=2, **settings)
    epsilon, delta = made.record.metrics[-1]["dp/epsilon"], made.pipeline.one(Privacy).delta
    total = sum(math.exp(epsilon * step) for step in range(steps)) * delta  # group privacy, from one step to the next
    assert made.manifest["membership"]["bound"] == pytest.approx(bound(steps * epsilon, total), rel=1e-6)
    assert 0.01 < made.manifest["membership"]["bound"] < 1
