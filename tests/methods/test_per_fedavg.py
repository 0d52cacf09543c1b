"""Per-FedAvg: the gradient at the end of a step, the Hessian by differences, and the step before every judgement."""

import copy

import pytest
import torch
from problems import Quadratics, network, node, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.personalize.per_fedavg import PerFedAvg
from fedloom.node import Client
from fedloom.tasks.toy import Toy


@pytest.mark.parametrize("variant", ["fo", "hf"])
def test_rounds_by_hand(variant):
    task, alpha, lr = Quadratics(sizes=(4, 12)), 0.2, 0.1
    made = ran(PerFedAvg(lr=lr, alpha=alpha, variant=variant, steps=3, batch=0), task, rounds=3)
    w, one = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    for _ in range(3):
        ends = []
        for k in range(2):
            end = w
            for _ in range(3):
                v = task.gradient(k, end - alpha * task.gradient(k, end))
                end = end - lr * (v if variant == "fo" else (one - alpha * task.curvatures[k]) @ v)
            ends.append(end)
        w = (ends[0] + ends[1]) / 2  # as many samples as they may have
    assert torch.allclose(made.server.model.flat, w, rtol=0, atol=1e-9)


def test_hessian_free_is_the_exact_gradient_on_a_quadratic():
    task, alpha = Quadratics(sizes=(4,)), 0.3
    made = ran(PerFedAvg(lr=1.0, alpha=alpha, variant="hf", steps=1, batch=0), task, rounds=1)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def f(w):
        away = w - task.centers[0]
        return 0.5 * away @ task.curvatures[0] @ away

    (slope,) = torch.autograd.grad(f(w), w, create_graph=True)
    (exact,) = torch.autograd.grad(f(w - alpha * slope), w)
    assert torch.allclose(made.server.model.flat, -exact, rtol=0, atol=1e-9)


def slopes(net, task, batch):
    return torch.autograd.grad(task.loss(net, batch), list(net.parameters()))


def moved(net, by, slopes):
    """A copy whose parameters have moved."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p, g in zip(net.parameters(), slopes, strict=True):
            p += by * g
    return net


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("variant", ["fo", "hf"])
def test_each_gradient_has_a_batch_of_its_own_and_the_first_moves_running_statistics(variant, norm):
    task = Toy(sizes=(25,), norm=norm)
    made = ran(PerFedAvg(lr=0.1, alpha=0.2, variant=variant, steps=3, batch=5, delta=0.01), task, rounds=1)
    net = network(task, made.site.initial).train()
    batches = iter([*node(made.site, 0).batches(5, steps=9 if variant == "hf" else 6)])
    for _ in range(3):
        near = moved(net, -0.2, slopes(net, task, next(batches)))
        v = slopes(near, task, next(batches))
        if variant == "hf":
            third = next(batches)
            ahead, behind = (slopes(moved(net, sign * 0.01, v), task, third) for sign in (1, -1))
            v = [g - 0.2 * (a - b) / 0.02 for g, a, b in zip(v, ahead, behind, strict=True)]
        net = moved(net, -0.1, v)
    state = net.state_dict()
    for name in made.server.model:
        torch.testing.assert_close(made.server.model[name], state[name], rtol=1e-4, atol=1e-5)


def test_without_a_step_it_is_fedavg():
    task = Quadratics(sizes=(4, 4))
    meta = ran(PerFedAvg(lr=0.1, alpha=0.0, steps=4, batch=0), task, rounds=3)
    plain = ran(FedAvg(lr=0.1, epochs=4, batch=0), task, rounds=3)
    assert torch.allclose(meta.server.model.flat, plain.server.model.flat, rtol=0, atol=1e-12)


def test_clients_are_judged_after_their_step_from_the_present_model():
    task, method = Toy(newcomers=(20, 24)), PerFedAvg(alpha=0.3, adapt=2, steps=3, batch=5)
    made = ran(method, task, rounds=2, cohort=2)

    def right(k, nth):
        batches = [*Client(made.site, k, {}, "evaluate", 2, nth).batches(5, steps=2)]
        net = network(task, made.server.model)
        for batch in batches:
            net = moved(net, -0.3, slopes(net, task, batch))
        data = task.data(k, "test")
        return float((net(data.x).argmax(1) == data.y).double().mean())

    assert [one["accuracy"] for one in made.record.clients["clients"]] == [
        pytest.approx(right(k, 0)) for k in range(4)
    ], "also those that were not asked"
    assert [one["accuracy"] for one in made.record.clients["newcomers"]] == [pytest.approx(right(k, 1)) for k in (4, 5)]
    assert not made.engine.states, "clients remember nothing"


def test_a_step_takes_two_gradients_or_four():
    for variant, count in (("fo", 2), ("hf", 4)):
        row = ran(PerFedAvg(variant=variant, steps=3), Toy(), rounds=1).record.metrics[0]
        assert row["gradient_steps"] == 4 * 3 * count


def test_one_step_leads_farther_from_it_than_from_fedavgs_model():
    """Clients whose optima lie apart: the model from which a step does most is another than the best for all."""
    task, alpha = Quadratics(sizes=(4, 4)), 0.4
    meta = ran(PerFedAvg(lr=0.2, alpha=alpha, variant="hf", steps=1, batch=0), task, rounds=150).server.model.flat
    plain = ran(FedAvg(lr=0.2, batch=0), task, rounds=150).server.model.flat

    def after(w):
        total = 0.0
        for k in range(2):
            away = w - alpha * task.gradient(k, w) - task.centers[k]
            total += float(away @ task.curvatures[k] @ away)
        return total

    assert after(meta) < 0.98 * after(plain)


def test_what_cannot_be_is_told():
    with pytest.raises(UsageError, match=r"per_fedavg\.delta is 0"):
        PerFedAvg(variant="hf", delta=0.0)
    with pytest.raises(UsageError, match=r"per_fedavg does not go with dp=sample:noise=1: a step takes several"):
        ran(PerFedAvg(), Toy(), rounds=1, dp="sample:noise=1")
