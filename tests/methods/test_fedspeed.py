"""FedSpeed: the two passes, the correction, the two ways to pool h."""

import pytest
import torch
from problems import UNHEARD, Quadratics, close, network, node, ran, settled_by_those_heard, sharpness_aware

from fedloom.errors import UsageError
from fedloom.evaluator import STATISTICS
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedspeed import FedSpeed
from fedloom.tasks.toy import Toy

FAR = 1e6  # a bound on gradients that never binds


@pytest.mark.parametrize("pool", ["all", "cohort"])
@pytest.mark.parametrize(("rho", "alpha"), [(0.3, 1.0), (0.3, 0.4), (0.0, 1.0)])
def test_rounds_by_hand(pool, rho, alpha):
    task, lr, lam, wd = Quadratics(), 0.05, 0.7, 0.02
    method = FedSpeed(lr=lr, epochs=3, batch=0, lam=lam, rho=rho, alpha=alpha, clip=FAR, weight_decay=wd, pool=pool)
    made = ran(method, task, rounds=3)
    x, h = torch.zeros(2, dtype=torch.float64), [torch.zeros(2, dtype=torch.float64)] * 2
    for _ in range(3):
        ends = []
        for k in range(2):
            y = x
            for _ in range(3):
                g = task.gradient(k, y)
                if rho:
                    g = (1 - alpha) * g + alpha * task.gradient(k, y + rho * g / (g.norm() + 1e-7))
                y = y - lr * (g + lam * (y - x + h[k]) + wd * y)
            h[k] = h[k] + y - x
            ends.append(y)
        x = sum(ends) / 2 + sum(h) / 2
    assert torch.allclose(made.server.model.flat, x, rtol=0, atol=1e-10)
    for k in range(2):
        assert torch.allclose(made.engine.states[k]["dual"].flat, h[k], rtol=0, atol=1e-10)


def test_both_pools_agree_when_everybody_takes_part_and_differ_when_not():
    one, other = (FedSpeed(epochs=2, pool=pool) for pool in ("all", "cohort"))
    full = [ran(method, Toy(), rounds=4).server.model.flat for method in (one, other)]
    torch.testing.assert_close(*full)
    part = [ran(method, Toy(), rounds=4, cohort=2).server.model.flat for method in (one, other)]
    assert (part[0] - part[1]).norm() > 1e-3


def test_without_pull_and_ascent_the_cohorts_path_is_fedavgs():
    # With lambda = 0 the pooled h would still be added: take it out of the first round by hand.
    task = Toy(sizes=(20, 20, 20))
    speed = ran(FedSpeed(epochs=1, lam=0.0, rho=0.0, clip=FAR), task, rounds=1)
    plain = ran(FedAvg(), task, rounds=1)
    torch.testing.assert_close((speed.server.model - speed.server.dual).flat, plain.server.model.flat)


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_the_ascent_goes_along_the_whole_gradient_and_moves_no_running_statistics(buffers):
    task = Toy(sizes=(25,), norm=True)
    made = ran(FedSpeed(epochs=2, lam=0.0, rho=0.5, clip=FAR), task, rounds=1, buffers=buffers)
    batches = list(node(made.site, 0).batches(10, epochs=2))
    by_hand = sharpness_aware(network(task, made.site.initial), task, batches, lr=0.05, rho=0.5)
    reached = made.server.model.merge(made.server.model.params - made.server.dual)  # without h
    if buffers == "local":
        reached = reached.merge(type(reached)(made.engine.states[0][STATISTICS], reached.buffers.layout))
    assert close(reached, by_hand.state_dict())


def test_of_dp_only_the_one_that_accounts_for_single_gradients_is_refused():
    with pytest.raises(UsageError, match=r"fedspeed does not go with dp=sample:noise=1: it takes two gradients"):
        ran(FedSpeed(), Toy(), rounds=1, dp="sample:noise=1")
    assert ran(FedSpeed(), Toy(), rounds=1, dp="client:noise=1.0,clip=1.0").record.manifest["dp"]


def test_the_average_gradient_is_zero_where_it_rests():
    task = Quadratics(sizes=(4, 4))
    made = ran(FedSpeed(lr=0.1, epochs=10, batch=0, rho=0.0, lam=1.0, clip=FAR), task, rounds=50)
    x = made.server.model.flat
    assert torch.allclose(x, task.optimum([1.0, 1.0]), rtol=0, atol=1e-6), "FedAvg with ten steps rests elsewhere"
    for k in range(2):
        assert torch.allclose(task.gradient(k, x), -1.0 * made.engine.states[k]["dual"].flat, rtol=0, atol=1e-5)
    drifting = ran(FedAvg(lr=0.1, epochs=10, batch=0), task, rounds=50).server.model.flat
    assert (drifting - task.optimum([1.0, 1.0])).norm() > 0.05


def test_the_gradient_is_bounded_in_length():
    task = Quadratics(sizes=(4,))
    made = ran(FedSpeed(lr=0.1, epochs=1, batch=0, rho=0.0, lam=0.0, clip=0.5, pool="cohort"), task, rounds=1)
    assert made.server.model.norm() == pytest.approx(2 * 0.1 * 0.5), "the step, and as much again as h"


def test_a_step_takes_two_gradients_and_a_message_is_one_model():
    made = ran(FedSpeed(epochs=1), Toy(), rounds=1)
    plain = ran(FedAvg(), Toy(), rounds=1)
    assert made.record.metrics[0]["gradient_steps"] == 2 * plain.record.metrics[0]["gradient_steps"]
    up = {line["field"] for line in made.record.ledger if line["direction"] == "up" and line["kind"] == "train"}
    assert up == {"delta", "envelope"}


@pytest.mark.parametrize("fate", UNHEARD, ids=str)
def test_a_reply_that_does_not_count_moves_neither_side(fate):
    assert settled_by_those_heard(FedSpeed(lr=0.3, epochs=3, batch=0, lam=1.0, rho=0.0, clip=FAR), "dual", **fate)


def test_with_its_defaults_the_correction_does_not_run_away():
    def length(method):
        return float(ran(method, Toy(sizes=(30, 22)), rounds=20).server.model.norm())

    plain = length(FedAvg(epochs=5))
    assert 0.8 * plain < length(FedSpeed()) < 1.2 * plain
    assert length(FedSpeed(lam=0.1)) > 2 * plain, "as it does where a round's work does not go far enough"
