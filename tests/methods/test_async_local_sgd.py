"""Asynchronous Local-SGD: delayed Nesterov against torch's, the inner AdamW, and steps by speed."""

import pytest
import torch
from arrivals import by_hand, trained
from problems import Quadratics, network, node, ran

from fedloom.methods.asynchronous.async_local_sgd import AsyncLocalSGD
from fedloom.tasks.toy import Toy

PLAIN = {"inner": "sgd", "lr": 0.1, "dynamic": False}


class One(Quadratics):
    centers = Quadratics.centers[:1]
    curvatures = Quadratics.curvatures[:1]


def test_a_window_of_one_is_nesterovs_momentum_of_torch():
    task = One((4,))
    made = ran(AsyncLocalSGD(window=1, steps=3, batch=0, server_lr=0.5, beta=0.8, **PLAIN), task, 5)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.SGD([theta], lr=0.5, momentum=0.8, nesterov=True)
    for _ in range(5):
        theta.grad = theta.detach() - trained(task, 0, theta.detach(), 0.1, 3)
        outer.step()
    assert torch.allclose(made.server.model.flat, theta.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("c", [0.0, 0.3])
def test_the_momentum_moves_once_in_a_window(c):
    task, eps, beta, n = Quadratics((4, 4)), 0.6, 0.9, 3
    made = ran(AsyncLocalSGD(window=n, steps=4, batch=0, c=c, server_lr=eps, beta=beta, **PLAIN), task, 4)
    # Both end at one moment, so a round is two pushes, client 0's first: both from the model of the round.
    theta, m, gathered = (torch.zeros(2, dtype=torch.float64) for _ in range(3))
    for t in range(8):
        if t % 2 == 0:
            start = theta
        g = start - trained(task, t % 2, start, 0.1, 4)
        gathered = gathered + g
        if (t + 1) % n == 0:
            m, gathered = beta * m + gathered / n, 0 * gathered
            theta = theta - eps * ((1 - c * n + c) * beta * m + g / n)
        else:
            theta = theta - eps * (c * beta * m + g / n)
    assert torch.allclose(made.server.model.flat, theta, rtol=0, atol=1e-12)
    assert torch.allclose(made.server.m.flat, m, rtol=0, atol=1e-12) and m.norm() > 0.1


def test_without_momentum_every_push_moves_its_share():
    task, rounds = Quadratics((4, 4)), 7
    fields = {"steps": 4, "batch": 0, "beta": 0.0, "server_lr": 0.7, "window": 5}
    made = ran(AsyncLocalSGD(**fields, **PLAIN), task, rounds, speed="classes:1x0.5,2.3x0.5")
    speeds = [made.world.profile(k)["speed"] for k in (0, 1)]
    models, stale = [torch.zeros(2, dtype=torch.float64)], []
    for [(c, s)] in by_hand([4 / speed for speed in speeds], rounds):
        start = models[-1 - s]
        models.append(models[-1] + 0.7 / 5 * (trained(task, c, start, 0.1, 4) - start))
        stale.append(s)
    assert torch.allclose(made.server.model.flat, models[-1], rtol=0, atol=1e-12) and max(stale) == 2


def test_the_inner_optimizer_is_adamw_of_torch_and_remembers():
    task = Toy(sizes=(25,))
    method = AsyncLocalSGD(window=1, beta=0.0, server_lr=1.0, lr=0.01, steps=7, weight_decay=0.2)
    made = ran(method, task, 2)
    net = network(task, made.site.initial)
    inner = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.2)
    for round in (1, 2):
        for batch in node(made.site, 0, round).batches(10, steps=7):
            inner.zero_grad()
            task.loss(net, batch).backward()
            inner.step()
    assert made.engine.states[0]["done"] == 14
    for name, value in net.named_parameters():
        assert torch.allclose(made.server.model[name], value.detach(), rtol=0, atol=1e-5)


def test_the_inner_rate_warms_up_and_falls():
    rate = AsyncLocalSGD(lr=1.0, warmup=4, horizon=24).rate
    assert [rate(k) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(4) == 1.0 and rate(14) == pytest.approx(0.55)
    assert rate(24) == pytest.approx(0.1) == rate(1000)
    assert AsyncLocalSGD(lr=0.3).rate(10**6) == 0.3


def test_slower_workers_take_fewer_steps():
    made = ran(AsyncLocalSGD(steps=12), Toy(sizes=(20,) * 4), 30, speed="classes:1x0.25,2x0.25,5x0.25,10x0.25")
    speeds = {k: made.world.profile(k)["speed"] for k in range(4)}
    assert set(made.server.speed) == set(range(4))
    assert all(made.method.share(made.server.speed, k) == int(1.2 * speeds[k]) for k in range(4))
    assert made.method.share({}, 0) == 12, "nobody knows its speed yet"
    off = ran(AsyncLocalSGD(steps=12, dynamic=False), Toy(sizes=(20,) * 4), 4, speed="uniform:1,9")
    assert {off.method.share(off.server.speed, k) for k in range(4)} == {12}


def test_whoever_ends_within_the_grace_period_is_taken_in_before_anybody_begins():
    settings = {"speed": "lognormal:0.5", "step_seconds": 1.0}
    at_once = ran(AsyncLocalSGD(dynamic=False), Toy(), 4, **settings)
    graced = ran(AsyncLocalSGD(dynamic=False, grace=1000.0), Toy(), 4, **settings)
    assert at_once.server.pushes == 4 and graced.server.pushes == 16


def test_running_statistics_go_by_a_push_share_of_the_window():
    task = Toy(norm=True, sizes=(20, 20, 20))
    made = ran(AsyncLocalSGD(steps=3, window=4, **PLAIN), task, 1)
    expected = made.site.initial.buffers
    for k in range(3):  # all end at one moment
        w, _ = node(made.site, k).descend(made.site.initial, lr=0.1, steps=3, batch=10)
        expected = 0.75 * expected + 0.25 * w.buffers
    assert torch.allclose(made.server.model.buffers.flat, expected.flat, rtol=0, atol=1e-6)


def test_a_clock_that_stands_still_makes_all_workers_alike():
    made = ran(AsyncLocalSGD(steps=12), Toy(), 6, step_seconds=0)
    assert {made.method.share(made.server.speed, k) for k in made.server.speed} == {12}
