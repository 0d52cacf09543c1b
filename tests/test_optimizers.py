"""Optimizers against torch's own, or their paper's formula; and clients together as each alone."""

from dataclasses import dataclass

import pytest
import torch
from test_vectorized import RAGGED, agrees
from torch import nn
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Client
from fedloom.optimizers import SGD, Adagrad, Adam, DeltaSGD, Linear, optimizer
from fedloom.random import seeded
from fedloom.site import Site
from fedloom.task import Data
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab
from fedloom.vector import Vector

TORCHS = [
    (SGD(0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    (Adam(), lambda p: torch.optim.Adam(p, 0.1)),
    (Adam(0.5, 0.9, 1e-3), lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.9), eps=1e-3)),
    (Adam(weight_decay=0.3), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3)),
    (Adagrad(), lambda p: torch.optim.Adagrad(p, 0.1)),
]


def at(sizes=(23, 9)):
    return Site(Toy(sizes), 0)


class Bowl(nn.Module):
    """The point w, in double precision."""

    def __init__(self, width=4):
        super().__init__()
        self.a = nn.Parameter(torch.arange(1.0, 1.0 + width // 2, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(1, width - width // 2, dtype=torch.float64))


def bowl(net, batch):
    """Half of the mean over samples of h |w - x|^2: the curvature of a sample stands in its first coordinate."""
    w = torch.cat([net.a, net.b.flatten()])
    return 0.5 * (batch.x[:, 0] * ((w - batch.x[:, 1:]) ** 2).sum(1)).mean()


BENDS = torch.tensor([1.0, 4.0, 0.2, 9.0], dtype=torch.float64)  # by coordinate


def valley(net, batch):
    """The same with a curvature of each coordinate's own, and a fourth power, so that no quotient is a constant."""
    away = torch.cat([net.a, net.b.flatten()]) - batch.x[:, 1:]
    return (0.5 * batch.x[:, :1] * BENDS * away**2 + 0.1 * away**4).sum(1).mean()


def bowls(rows=12, seed=0, h=None):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=draw, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() + 0.5 if h is None else h
    return Data(x, torch.zeros(rows, dtype=torch.long))


@pytest.mark.parametrize(("mine", "torchs"), TORCHS, ids=lambda one: str(one) if hasattr(one, "step") else "")
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_descents_are_those_of_torchs_optimizers(mine, torchs, decay):
    site, data = at(), bowls()
    me, other = Client(site, 0, {}), Client(site, 0, {})
    start = me.network(Bowl)
    how = {"epochs": 3, "batch": 5, "data": data, "loss": bowl}
    w, steps = me.descend(start, 0.1, optimizer=mine, weight_decay=decay, clip=1.0, **how)
    net = Bowl()
    rule = torchs(net.parameters())
    for batch in other.batches(5, epochs=3, data=data):
        rule.zero_grad()
        bowl(net, batch).backward()
        scale = min(1.0, 1.0 / float(nn.utils.get_total_norm([p.grad for p in net.parameters()])))
        for p in net.parameters():
            p.grad = scale * p.grad + decay * p.detach()  # a term of the loss, whatever comes of its gradient
        rule.step()
    assert steps == 9 == me.steps
    torch.testing.assert_close(w.flat, Vector.of(net, w.layout).flat)


def test_an_optimizer_begins_anew_with_every_descent():
    site = at()
    me = Client(site, 0, {})
    once = [me.descend(site.initial, 0.1, steps=1, data=site.task.data(0, "train"), optimizer=Adam())[0] for _ in "ab"]
    assert torch.equal(once[0].flat, once[1].flat)


def by_the_paper(data, order, w, eta_0, gamma, delta, eps):
    """Delta-SGD in plain loops: the points, and the step size of each step."""

    def slope(at, rows):
        x = data.inputs[rows]
        away = at - x[:, 1:]
        return (x[:, :1] * BENDS * away + 0.4 * away**3).mean(0)

    points, etas, eta, theta, before = [w], [], eta_0, 1.0, None
    for rows in order:
        g = slope(w, rows)
        if before is not None:
            moved, turned = float((w - before).norm()), float((g - slope(before, rows)).norm())
            grown = (1 + delta * theta) ** 0.5 * eta
            new = min(gamma * moved / (2 * turned), grown) + eps if moved > 0 and turned > 0 else grown
            theta, eta = new / eta, new
        before, w = w, w - eta * g
        points.append(w)
        etas.append(eta)
    return points, etas


def order_of(rule_client, data, batch, epochs):
    return list(rule_client.rows(batch, epochs, None, data))


@pytest.mark.parametrize("eta_0", [1e-3, 0.05, 0.2])
def test_delta_sgd_is_the_papers_loop(eta_0):
    site, data = at(), bowls()
    me, again = Client(site, 0, {}), Client(site, 0, {})
    start = me.network(Bowl)
    rule = DeltaSGD(gamma=1.5, delta=0.3, eps=1e-3)
    w, steps = me.descend(start, eta_0, epochs=3, batch=4, data=data, loss=valley, optimizer=rule)
    points, etas = by_the_paper(data, order_of(again, data, 4, 3), start.flat, eta_0, 1.5, 0.3, 1e-3)
    assert steps == 9 and len({*etas}) > 3
    torch.testing.assert_close(w.flat, points[-1])
    assert me.steps == 17 and me.samples == 17 * 4, (
        "the look back at a batch is a gradient too, of all steps but the first"
    )


def test_delta_sgd_finds_the_curvature_at_its_second_step():
    site, data = at(), bowls(h=2.0)
    me = Client(site, 0, {})
    start = me.network(Bowl)
    rule = DeltaSGD(eps=0.0)
    reached = [me.descend(start, 1e-2, steps=k, data=data, loss=bowl, optimizer=rule)[0].flat for k in (1, 2)]
    grown = 1e-2 * (1 + 0.1) ** 0.5  # from a small rate it may only grow
    middle = data.inputs[:, 1:].mean(0)
    torch.testing.assert_close(reached[1] - reached[0], -grown * 2.0 * (reached[0] - middle))
    far = [me.descend(start, 0.7, steps=k, data=data, loss=bowl, optimizer=rule)[0].flat for k in (1, 2)]
    torch.testing.assert_close(far[1], middle)  # gamma / (2 h) = 1 / h is Newton's step
    assert not torch.allclose(far[0], middle)


def test_delta_sgd_takes_the_second_candidate_alone_where_the_gradient_does_not_turn():
    me = Client(at(), 0, {})
    start, rule = me.network(Bowl), DeltaSGD(delta=0.0, eps=0.5)
    w, steps = me.descend(start, 0.25, steps=4, loss=lambda net, batch: net.a.sum() + net.b.sum(), optimizer=rule)
    torch.testing.assert_close(start.flat - w.flat, torch.full_like(w.flat, steps * 0.25))


def test_delta_sgd_without_growth_and_far_from_the_bound_is_sgd():
    site, data = at(), bowls()
    me, other = Client(site, 0, {}), Client(site, 0, {})
    start = me.network(Bowl)
    how = {"epochs": 2, "batch": 5, "data": data, "loss": bowl}
    mine, _ = me.descend(start, 1e-3, optimizer=DeltaSGD(delta=0.0, eps=0.0), **how)
    torch.testing.assert_close(mine.flat, other.descend(start, 1e-3, **how)[0].flat)


def test_delta_sgd_looks_back_at_the_whole_direction_and_moves_no_statistics():
    """With a correction and weight decay the direction's change has their part; BatchNorm moves once a batch."""
    site = Site(Toy((20,), norm=True), 0)
    start = site.initial
    pull = {"correct": lambda v: 3.0 * (v - start), "weight_decay": 0.5}
    seen = []

    class Spy(DeltaSGD):
        def step(self, at, d, rate, memory, again):
            if again is not None:
                here = [tensor.clone() for tensor in at]
                seen.append(max(float((a - b).abs().max()) for a, b in zip(again(here), d, strict=True)))
            super().step(at, d, rate, memory, again)

    me, other = Client(site, 0, {}), Client(site, 0, {})
    w, _ = me.descend(start, 0.05, epochs=2, batch=5, optimizer=Spy(delta=0.0, eps=0.0, gamma=1e9), **pull)
    assert seen and max(seen) < 1e-4, "at the present point the look back gives the present direction"
    plain, _ = other.descend(start, 0.05, epochs=2, batch=5, **pull)
    torch.testing.assert_close(w.flat, plain.flat, rtol=1e-4, atol=1e-5)


class Dropping(Toy):
    def network(self):
        net = super().network()
        net.body.append(nn.Dropout(0.5))
        return net


def test_the_look_back_has_the_same_draws_and_later_ones_do_not_notice():
    site, seen = Site(Dropping((20,)), 0), []

    class Spy(DeltaSGD):
        def step(self, at, d, rate, memory, again):
            if again is not None:
                seen.append(all(torch.equal(a, b) for a, b in zip(again([one.clone() for one in at]), d, strict=True)))
            SGD().step(at, d, rate, [], None)

    with seeded(1):
        w, _ = Client(site, 0, {}).descend(site.initial, 0.1, epochs=2, batch=5, optimizer=Spy())
    with seeded(1):
        plain, _ = Client(site, 0, {}).descend(site.initial, 0.1, epochs=2, batch=5)
    assert seen == [True] * 7 and torch.equal(w.flat, plain.flat)


def test_a_linear_rate_begins_anew_and_its_mean_is_that_of_its_steps():
    site = at()
    me = Client(site, 0, {})

    def steep(net, batch):  # of slope 1 in every parameter
        return sum(p.sum() for p in net.parameters()) + 0.0 * batch.x.sum()

    for epochs in (1, 2):
        w, steps = me.descend(site.initial, Linear(0.3, 0.1), epochs=epochs, batch=5, loss=steep)
        rates = [(1 - k / steps) * 0.3 + k / steps * 0.1 for k in range(steps)]
        torch.testing.assert_close((site.initial - w).params.flat, torch.full_like(w.params.flat, sum(rates)))
        assert Linear(0.3, 0.1).mean(steps) * steps == pytest.approx(sum(rates))
    first = me.descend(site.initial, Linear(0.3, 0.1), steps=1, loss=steep)[0]
    torch.testing.assert_close((site.initial - first).params.flat, torch.full_like(w.params.flat, 0.3))


@dataclass(frozen=True)
class Every(FedAvg):
    """Descents by every optimizer, and at a rate that falls."""

    @client
    def local(self, client, model):
        w, pull = model, lambda v: 0.3 * (v - model)
        for rule in (SGD(0.5), Adam(weight_decay=0.1), Adagrad(), DeltaSGD(), None):
            w, _ = client.descend(w, Linear(0.05, 0.01), epochs=2, batch=6, optimizer=rule, correct=pull)
        w, _ = client.descend(w, 0.02, epochs=2, batch=6, optimizer=DeltaSGD(), clip=0.5)
        tight = DeltaSGD(gamma=0.3)  # the smoothness binds
        w, _ = client.descend(w, 0.5, epochs=2, batch=6, optimizer=tight)
        w, _ = client.descend(w, 0.5, epochs=2, batch=6, optimizer=tight, correct=lambda v: 2.0 * (v - model))
        return {"delta": w - model, "n": client.n}


def test_clients_together_step_as_each_alone():
    agrees(Lab(Every), Toy(RAGGED))


def test_a_text_names_an_optimizer():
    assert optimizer("adam") == Adam() and optimizer("adam:0.5,eps=1e-3") == Adam(0.5, eps=1e-3)
    assert optimizer("sgd:0.9") == SGD(0.9) and optimizer("delta_sgd:gamma=1") == DeltaSGD(1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adm", "unknown optimizer 'adm'.*adam"),
        ("adam:beta3=1", "unknown option of adam 'beta3'"),
        ("adam:1.5", "beta1 is 1.5; it must be below 1"),
        ("adam:eps=0", "eps is 0.0; it must be greater than 0"),
        ("sgd:-0.5", "momentum is -0.5; it must be at least 0"),
        ("sgd:1", "momentum is 1.0; it must be below 1"),
    ],
)
def test_a_wrong_text_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        optimizer(text)


def test_momentum_is_that_of_sgd_only():
    site = at()
    with pytest.raises(UsageError, match=r"momentum=0.9 or an optimizer"):
        Client(site, 0, {}).descend(site.initial, 0.1, momentum=0.9, optimizer=Adam())


def test_the_loss_by_inputs():
    site = at()
    me = Client(site, 0, {})
    x, y = me.data.all()

    def loss(net, x):
        return F.cross_entropy(net(x), y)

    slope = me.input_grad(site.initial, x, loss)
    net, mine = me.net(site.initial), x.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(loss(net, mine), mine)[0])
    assert (me.steps, me.samples) == (1, len(x)) and not x.requires_grad and not slope.requires_grad
    before = me.descend(site.initial, 0.1, steps=1)[0]
    assert not torch.equal(before.flat, site.initial.flat), "the network learns on afterwards"


def test_the_loss_by_inputs_is_taken_in_evaluation_mode():
    site = Site(Toy((20,), norm=True), 0)
    me = Client(site, 0, {})
    x = me.data.x
    one = me.input_grad(site.initial, x, lambda net, x: net(x).square().sum())
    torch.testing.assert_close(one[:3], me.input_grad(site.initial, x[:3], lambda net, x: net(x).square().sum()))
