"""pFedMe: the inner problem, the two pulls, and who learns what."""

import copy

import pytest
import torch
from problems import Quadratics, close, network, node, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.personalize.pfedme import PFedMe
from fedloom.node import Client
from fedloom.tasks.toy import Toy


def by_hand(task, k, w, method):
    """w_i and theta of a client with whole batches."""
    theta = w
    for _ in range(method.steps):
        for _ in range(method.inner):
            g = task.gradient(k, theta) + method.lam * (theta - w) + method.mu * theta
            theta = theta - method.inner_lr * g
        w = w - method.lr * method.lam * (w - theta)
    return w, theta


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_rounds_by_hand(beta, mu):
    method = PFedMe(lr=0.03, inner_lr=0.05, lam=4.0, steps=3, inner=2, batch=0, mu=mu, beta=beta)
    task = Quadratics(sizes=(4, 12))
    made = ran(method, task, rounds=3)
    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        ends = [by_hand(task, k, w, method) for k in range(2)]
        w = (1 - beta) * w + beta * (ends[0][0] + ends[1][0]) / 2  # as many samples as they may have
    assert torch.allclose(made.server.model.flat, w, rtol=0, atol=1e-12)
    for k in range(2):
        assert torch.allclose(made.engine.states[k]["theta"].flat, ends[k][1], rtol=0, atol=1e-12)


def test_one_step_of_one_step_is_fedsgd():
    task = Toy(sizes=(20, 20, 20))
    moreau = ran(PFedMe(lr=0.02, inner_lr=0.1, lam=10.0, steps=1, inner=1, batch=0), task, rounds=4)
    plain = ran(FedAvg(lr=0.02 * 0.1 * 10.0, batch=0), task, rounds=4)
    torch.testing.assert_close(moreau.server.model.flat, plain.server.model.flat)


def test_without_a_pull_the_server_sees_its_model_back_and_theta_is_sgd():
    task = Toy()
    made = ran(PFedMe(lam=0.0, steps=3, inner=1, inner_lr=0.1), task, rounds=2)
    assert torch.equal(made.server.model.flat, made.site.initial.flat)
    for k in range(4):
        w, _ = node(made.site, k, 2).descend(made.site.initial, lr=0.1, steps=3, batch=20)
        torch.testing.assert_close(made.engine.states[k]["theta"].flat, w.flat)


def test_theta_is_the_proximal_point():
    task, lam = Quadratics(sizes=(4, 4)), 2.0
    made = ran(PFedMe(lr=0.0001, inner_lr=0.2, lam=lam, steps=1, inner=400, batch=0), task, rounds=1)
    for k in range(2):
        h, c = task.curvatures[k], task.centers[k]
        proximal = torch.linalg.solve(h + lam * torch.eye(2, dtype=torch.float64), h @ c)  # w = 0
        assert torch.allclose(made.engine.states[k]["theta"].flat, proximal, rtol=0, atol=1e-10)


def test_the_farther_the_stronger_the_pull():
    gaps = []
    for lam in (10.0, 100.0):
        made = ran(PFedMe(lr=0.001, inner_lr=0.005, lam=lam, steps=1, inner=300, batch=0), Quadratics((4, 4)), rounds=1)
        gaps.append(float(made.engine.states[0]["theta"].norm()))
    assert 6 < gaps[0] / gaps[1] < 11, "like 1 / lambda"


@pytest.mark.parametrize("buffers", ["average", "ignore"])
def test_the_inner_steps_are_on_one_batch_and_its_first_pass_moves_running_statistics(buffers):
    task = Toy(sizes=(25,), norm=True)
    method = PFedMe(lr=0.02, inner_lr=0.1, lam=3.0, steps=4, inner=3, batch=10)
    made = ran(method, task, rounds=1, buffers=buffers)
    net = network(task, made.site.initial).train()
    w = [p.detach().clone() for p in net.parameters()]
    for batch in node(made.site, 0).batches(10, steps=4):
        for k in range(3):
            looked = net if k == 0 else copy.deepcopy(net)
            slopes = torch.autograd.grad(task.loss(looked, batch), list(looked.parameters()))
            with torch.no_grad():
                for p, g, origin in zip(net.parameters(), slopes, w, strict=True):
                    p -= 0.1 * (g + 3.0 * (p - origin))
        w = [origin - 0.02 * 3.0 * (origin - p.detach()) for origin, p in zip(w, net.parameters(), strict=True)]
    theta = made.engine.states[0]["theta"]
    if buffers == "average":
        assert close(theta, net.state_dict())
    with torch.no_grad():
        for p, origin in zip(net.parameters(), w, strict=True):
            p.copy_(origin)
    if buffers == "average":
        assert close(made.server.model, net.state_dict())
    else:
        assert torch.equal(made.server.model.buffers.flat, made.site.initial.buffers.flat)


def test_bytes_are_fedavgs():
    fields = [
        {(line["direction"], line["field"], line["bytes"]) for line in made.record.ledger if line["kind"] == "train"}
        for made in (ran(PFedMe(), Toy(), rounds=1), ran(FedAvg(), Toy(), rounds=1))
    ]
    assert fields[0] == {line for line in fields[1] if line[1] not in ("n", "envelope")} | {
        line for line in fields[0] if line[1] == "envelope"
    }


def test_those_who_are_not_asked_learn_their_theta_if_all_train():
    few = ran(PFedMe(), Toy(), rounds=1, cohort=2)
    everybody = ran(PFedMe(all_train=True), Toy(), rounds=1, cohort=2)
    assert len(few.engine.states) == 2 and len(everybody.engine.states) == 4
    torch.testing.assert_close(few.server.model.flat, everybody.server.model.flat, rtol=0, atol=0)
    asked = few.world.choose(1)
    for k in range(4):
        state = everybody.engine.states[k]["theta"]
        nth = 0 if k in asked else 1
        made = Client(everybody.site, k, {}, "train", 1, nth)
        torch.testing.assert_close(PFedMe().trained(made, everybody.site.initial)[1].flat, state.flat, rtol=0, atol=0)
    down = [line for line in everybody.record.ledger if line["function"] == "personalize"]
    assert {line["direction"] for line in down} == {"down"}, "they send nothing"


def test_a_newcomer_is_judged_by_the_theta_that_it_learns():
    task = Toy(newcomers=(20, 24))
    method = PFedMe(steps=5)
    made = ran(method, task, rounds=2)
    right = []
    for k in (4, 5):
        late = Client(made.site, k, {}, "evaluate", 2, 1)
        right.append(late.evaluate(method.trained(late, made.server.model)[1])["accuracy"])
    assert made.record.final["newcomer_test_accuracy"] == pytest.approx(sum(right) / 2)
    assert not {4, 5} & {*made.engine.states}


def test_of_dp_only_the_one_that_accounts_for_single_gradients_is_refused():
    with pytest.raises(UsageError, match=r"pfedme does not go with dp=sample:noise=1: it takes several gradients"):
        ran(PFedMe(), Toy(), rounds=1, dp="sample:noise=1")
    assert ran(PFedMe(), Toy(), rounds=1, dp="client:noise=1.0,clip=1.0").record.manifest["dp"]
