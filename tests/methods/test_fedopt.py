"""FedOpt: its equations in plain Python, and what tells its optimizers apart."""

from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from problems import Quadratics, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedopt import FedOpt
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector


def point(*numbers):
    return Vector(torch.tensor(numbers, dtype=torch.float64), Layout(("w",), ((len(numbers),),), 1))


def server(v, m=0.0):
    return SimpleNamespace(v=point(*v), m=point(*[m] * len(v)))


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "yogi", "momentum"])
def test_three_rounds_are_the_equations_in_plain_python(optimizer):
    task, lr, eta, beta2, tau = Quadratics(), 0.1, 0.4, 0.8, 0.05
    beta1 = 0.0 if optimizer == "adagrad" else 0.9
    curvatures, centers, sizes = task.curvatures.tolist(), task.centers.tolist(), task.sizes.tolist()
    x, m, v = [0.0, 0.0], [0.0, 0.0], [tau**2, tau**2]
    for _ in range(3):
        delta = [0.0, 0.0]
        for h, c, n in zip(curvatures, centers, sizes, strict=False):
            w = list(x)
            for _ in range(4):
                away = [w[0] - c[0], w[1] - c[1]]
                w = [w[i] - lr * (h[i][0] * away[0] + h[i][1] * away[1]) for i in (0, 1)]
            delta = [delta[i] + n / sum(sizes) * (w[i] - x[i]) for i in (0, 1)]
        for i, d in enumerate(delta):
            if optimizer == "momentum":
                m[i] = beta1 * m[i] + d
                x[i] += eta * m[i]
                continue
            m[i] = beta1 * m[i] + (1 - beta1) * d
            if optimizer == "adagrad":
                v[i] += d * d
            elif optimizer == "adam":
                v[i] = beta2 * v[i] + (1 - beta2) * d * d
            else:
                v[i] -= (1 - beta2) * d * d * ((v[i] > d * d) - (v[i] < d * d))
            x[i] += eta * m[i] / (sqrt(v[i]) + tau)
    method = FedOpt(lr=lr, epochs=4, batch=0, optimizer=optimizer, server_lr=eta, beta2=beta2, tau=tau)
    made = ran(method, task, rounds=3)
    assert made.server.model.flat.tolist() == pytest.approx(x, abs=1e-12)
    if optimizer != "momentum":
        assert made.server.v.flat.tolist() == pytest.approx(v, abs=1e-12)


def test_yogi_leaves_v_where_it_equals_the_square_and_moves_it_by_no_more_than_the_square():
    here, method = server(v=(4.0, 9.0, 0.01)), FedOpt(optimizer="yogi", beta2=0.9)
    method.step(here, point(2.0, 1.0, 5.0))
    assert here.v.flat.tolist() == pytest.approx([4.0, 9.0 - 0.1, 0.01 + 0.1 * 25])


def test_after_a_shock_adam_forgets_and_yogi_does_not():
    adam, yogi = server(v=(1e-6, 1e-6)), server(v=(1e-6, 1e-6))
    for delta in (point(100.0, -100.0), *[point(0.0, 0.0)] * 3):
        shocked = adam.v, yogi.v
        FedOpt(optimizer="adam", beta2=0.9).step(adam, delta)
        FedOpt(optimizer="yogi", beta2=0.9).step(yogi, delta)
    assert adam.v.flat.tolist() == pytest.approx((0.9 * shocked[0]).flat.tolist())
    assert yogi.v.flat.tolist() == shocked[1].flat.tolist()


def test_adagrads_v_never_falls_and_its_first_step_is_a_sign():
    method, here = FedOpt(optimizer="adagrad", tau=1e-9), server(v=(1e-18, 1e-18))
    assert method.step(here, point(0.3, -20.0)).flat.tolist() == pytest.approx([1.0, -1.0], abs=1e-6)
    for delta in (point(0.0, 1.0), point(-2.0, 0.0)):
        before = here.v
        method.step(here, delta)
        assert (here.v.flat >= before.flat).all()
    assert here.v.flat.tolist() == pytest.approx([0.09 + 4, 400 + 1])


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "yogi"])
def test_a_very_large_tau_makes_the_step_m_over_tau(optimizer):
    method, here = FedOpt(optimizer=optimizer, tau=1e9, beta1=0.5), server(v=(1.0, 1.0), m=1.0)
    assert (method.step(here, point(3.0, -1.0)) * 1e9).flat.tolist() == pytest.approx([2.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 0.03), ("yogi", 0.03), ("adagrad", 0.03), ("momentum", 1.0)])
def test_the_servers_rate_where_none_is_given(optimizer, rate):
    given, plain = (ran(FedOpt(optimizer=optimizer, **some), Toy(), rounds=2) for some in ({"server_lr": rate}, {}))
    assert torch.equal(given.server.model.flat, plain.server.model.flat)


def test_running_statistics_get_the_plain_average():
    plain, adaptive = (ran(method(), Toy(norm=True), rounds=1).server.model for method in (FedAvg, FedOpt))
    assert torch.equal(plain.buffers.flat, adaptive.buffers.flat)
    assert not torch.equal(plain.params.flat, adaptive.params.flat)


def test_it_sends_what_fedavg_sends():
    assert list(ran(FedOpt(), Toy(), rounds=2).record.ledger) == list(ran(FedAvg(), Toy(), rounds=2).record.ledger)


def test_an_adaptive_step_needs_a_tau():
    with pytest.raises(UsageError, match="tau is 0"):
        FedOpt(tau=0.0)
    assert FedOpt(optimizer="momentum", tau=0.0).tau == 0.0
