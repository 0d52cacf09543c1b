"""FedNova: the norm of a_i, and the objective that normalised averaging minimises."""

import pytest
import torch
from problems import Quadratics, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fednova import FedNova, norm_of_weights
from fedloom.tasks.toy import Toy

UNEQUAL = (2, 16)  # samples, in batches of 2: one local step and eight


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.99])
def test_norm_of_weights_is_what_the_momentum_recursion_adds_up(rho):
    velocity = moved = 0.0
    for steps in range(1, 30):
        velocity = rho * velocity + 1.0  # a heavy ball under a gradient of one
        moved += velocity
        assert norm_of_weights(steps, rho) == pytest.approx(moved, rel=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_a_round_is_the_papers_update(rho):
    task, lr = Quadratics(UNEQUAL), 0.05
    got = ran(FedNova(lr=lr, batch=2, momentum=rho), task, rounds=1).server.model.flat
    zero = torch.zeros(2, dtype=torch.float64)
    normalised, norms = [], []
    for k, steps in enumerate((1, 8)):
        w = velocity = zero
        weights = [sum(rho**i for i in range(steps - step)) for step in range(steps)]  # the vector a_k
        for _ in range(steps):
            velocity = rho * velocity + task.gradient(k, w)
            w = w - lr * velocity
        normalised.append(-w / sum(weights))
        norms.append(sum(weights))
    share = [2 / 18, 16 / 18]
    effective = sum(p * a for p, a in zip(share, norms, strict=True))
    expected = -effective * sum(p * d for p, d in zip(share, normalised, strict=True))
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_unequal_steps_still_minimise_the_weighted_sum_where_fedavg_does_not():
    task, optimum = Quadratics(UNEQUAL), Quadratics(UNEQUAL).optimum(UNEQUAL)
    distances = []
    for lr in (0.1, 0.02):
        nova = task.balance([n * task.shrinkage(k, lr, n // 2) / (n // 2) for k, n in enumerate(UNEQUAL)])
        plain = task.balance([n * task.shrinkage(k, lr, n // 2) for k, n in enumerate(UNEQUAL)])
        distances.append([(nova - optimum).norm(), (plain - optimum).norm()])
        if lr == 0.1:
            for method, fixed in ((FedNova, nova), (FedAvg, plain)):
                w = ran(method(lr=lr, batch=2), task, rounds=50).server.model.flat
                assert torch.allclose(w, fixed, rtol=0, atol=1e-6)
    (nova_large, plain_large), (nova_small, plain_small) = distances
    assert nova_large < plain_large / 2
    assert nova_small < nova_large / 4, "the rest comes from the finite step and vanishes with it"
    assert plain_small > plain_large / 2, "FedAvg's objective is another one, however small the step"


def test_a_momentum_of_one_is_refused():
    with pytest.raises(UsageError, match="momentum is 1"):
        FedNova(momentum=1.0)


def test_running_statistics_get_the_plain_average():
    plain, nova = (ran(method(), Toy(norm=True), rounds=1).server.model for method in (FedAvg, FedNova))
    torch.testing.assert_close(nova.buffers.flat, plain.buffers.flat)
    assert not torch.allclose(nova.params.flat, plain.params.flat, atol=1e-4)
