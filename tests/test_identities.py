"""Settings in which one algorithm is another: a line each."""

import pytest
import torch
from problems import Quadratics, node, ran

from fedloom.mean import Sum
from fedloom.methods.aggregate.fedlaw import FedLAW
from fedloom.methods.heterogeneous.fedproto import FedProto
from fedloom.methods.optimize.centralized import Centralized
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.feddyn import FedDyn
from fedloom.methods.optimize.fednova import FedNova
from fedloom.methods.optimize.fedopt import FedOpt
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.methods.optimize.fedspeed import FedSpeed
from fedloom.methods.optimize.moon import Moon
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.methods.personalize.ditto import Ditto
from fedloom.methods.personalize.fedbn import FedBN
from fedloom.methods.personalize.local import Local
from fedloom.random import stream
from fedloom.site import Site
from fedloom.tasks.toy import Toy

BITWISE, ROUNDING = 0.0, 3e-6
UNEQUAL, NORM, ONE = Toy(), Toy(norm=True), Toy(sizes=(25,))
EQUAL = Toy(sizes=(32, 32, 32, 32))  # weights that are equal powers of two round as no weights do
DRIFT = {"lr": 0.1, "epochs": 2}  # several local steps, the last batch of an epoch a smaller one
UPRIGHT = FedSpeed(rho=0.0, lam=0.7, clip=1e6, **DRIFT)

GLOBAL = [  # what is the same, a method, another, the task, rounds, tolerance
    ("fedprox without a pull", FedProx(mu=0.0, **DRIFT), FedAvg(**DRIFT), NORM, 3, BITWISE),
    ("fedprox of one local step", FedProx(mu=5.0, batch=0), FedAvg(batch=0), NORM, 3, BITWISE),
    ("fedavgm without momentum", FedOpt(optimizer="momentum", beta1=0.0, server_lr=1.0), FedAvg(), NORM, 3, BITWISE),
    ("fednova of equal steps", FedNova(**DRIFT), FedAvg(**DRIFT), EQUAL, 3, ROUNDING),
    ("fednova of one client", FedNova(**DRIFT), FedAvg(**DRIFT), ONE, 3, ROUNDING),
    ("ditto's global model", Ditto(personal_epochs=3, **DRIFT), FedAvg(**DRIFT), NORM, 3, BITWISE),
    ("fedbn without batchnorm", FedBN(**DRIFT), FedAvg(**DRIFT), UNEQUAL, 3, BITWISE),
    ("moon without a contrast", Moon(mu=0.0, **DRIFT), FedAvg(**DRIFT), NORM, 3, ROUNDING),
    ("moon's first round", Moon(mu=10.0, **DRIFT), FedAvg(**DRIFT), UNEQUAL, 1, ROUNDING),
    ("scaffold's first round", Scaffold(**DRIFT), FedAvg(**DRIFT), EQUAL, 1, BITWISE),
    ("scaffold of one local step", Scaffold(batch=0), FedAvg(batch=0), EQUAL, 3, ROUNDING),
    ("scaffold of one client", Scaffold(**DRIFT), FedAvg(**DRIFT), ONE, 3, ROUNDING),
    ("fedspeed without an ascent", UPRIGHT, FedDyn(alpha=0.7, **DRIFT), NORM, 3, ROUNDING),
    ("fedlaw that learns nothing", FedLAW(server_epochs=0, **DRIFT), FedAvg(**DRIFT), NORM, 3, ROUNDING),
    ("pooled descent", Centralized(batch=0), FedAvg(batch=0), UNEQUAL, 3, ROUNDING),
    ("pooled descent on quadratics", Centralized(batch=0), FedAvg(batch=0), Quadratics(noise=1.0), 5, 1e-12),
]

PERSONAL = [  # what is the same, a method, its models, another, its models, the task, tolerance
    ("ditto without a pull", Ditto(lam=0.0, batch=0), "personal", Local(batch=0), "model", NORM, BITWISE),
    ("fedproto without a pull", FedProto(lam=0.0, **DRIFT), "model", Local(**DRIFT), "model", NORM, BITWISE),
]


def agree(one, other, atol):
    return torch.equal(one.flat, other.flat) if atol == BITWISE else torch.allclose(one.flat, other.flat, 0, atol)


@pytest.mark.parametrize("identity", GLOBAL, ids=lambda line: line[0])
def test_the_same_global_model(identity):
    _, one, other, task, rounds, atol = identity
    made = ran(one, task, rounds)
    assert agree(made.server.model, ran(other, task, rounds).server.model, atol)
    assert (made.server.model - made.site.initial).norm() > 0.1, "and it has learned"


@pytest.mark.parametrize("identity", PERSONAL, ids=lambda line: line[0])
def test_the_same_personal_models(identity):
    _, one, mine, other, theirs, task, atol = identity
    ones, others = (ran(method, task, rounds=3).engine.states for method in (one, other))
    assert ones.keys() == others.keys() == set(range(task.population))
    assert all(agree(ones[k][mine], others[k][theirs], atol) for k in ones)


def test_alone_local_training_is_fedavg():
    local, fedavg = (ran(method(**DRIFT), ONE, rounds=3) for method in (Local, FedAvg))
    assert agree(local.engine.states[0]["model"], fedavg.server.model, ROUNDING)


@pytest.mark.parametrize("task", [UNEQUAL, NORM], ids=["plain", "batchnorm"])
def test_descend_is_the_loop_over_grad(task):
    # To rounding: `descend` adds -lr times the gradient in one fused operation, the loop in two.
    site = Site(task, seed=0)
    (mine, mine_too), (theirs, theirs_too) = [[node(site, k) for k in (0, 1)] for _ in range(2)]
    correction = (site.initial * 0.1).params
    for a, b, settings in ((mine, theirs, {}), (mine_too, theirs_too, {"correct": correction, "weight_decay": 0.01})):
        fast, steps = a.descend(site.initial, lr=0.1, epochs=2, batch=10, **settings)
        w, count = site.initial.clone(), 0
        for batch in b.batches(10, epochs=2):
            g = b.grad(w, batch)
            if settings:
                g = g.merge(g.params + correction + 0.01 * w.params)
            w, count = w - 0.1 * g, count + 1
        assert agree(fast, w, ROUNDING)
        assert steps == count == a.steps == b.steps
        assert a.samples == b.samples


def test_descend_of_one_part_leaves_the_others_bitwise():
    site = Site(NORM, seed=0)
    w, _ = node(site, 0).descend(site.initial, lr=0.1, epochs=2, batch=10, only="head.*")
    parameters = site.initial.params.select("body.*")
    assert torch.equal(w.select(*parameters).flat, parameters.flat)
    assert not torch.equal(w.select("head.*").flat, site.initial.select("head.*").flat)


@pytest.mark.parametrize("weight", [1.0, 7.0, 123457.0])
def test_the_mean_of_one_reply_is_that_reply(weight):
    value = torch.randn(1000, generator=stream(0, "mean")) * 1e-3
    (mean,) = Sum.of({"delta": value}, weight).mean().values()
    assert torch.equal(mean, value)
