"""APFL: the global part, the mix, and the share that is learned."""

import pytest
import torch
from problems import Quadratics, node, ran

from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.methods.personalize.apfl import APFL
from manyhands.tasks.toy import Toy


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.9, "adaptive": False}])
def test_the_global_model_is_fedavgs_bitwise(settings):
    mixed, plain = ran(APFL(**settings), Toy(), rounds=4), ran(FedAvg(), Toy(), rounds=4)
    assert torch.equal(mixed.server.model.flat, plain.server.model.flat)
    rows = zip(mixed.record.metrics, plain.record.metrics, strict=True)
    assert all(one["up_bytes"] == other["up_bytes"] for one, other in rows)


def test_rounds_by_hand():
    task, lr, mu = Quadratics(sizes=(4, 4)), 0.05, 0.02
    made = ran(APFL(lr=lr, epochs=3, batch=0, alpha=0.4, mu=mu), task, rounds=3)
    zero = torch.zeros(2, dtype=torch.float64)
    server, own, share = zero, [zero] * 2, [0.4] * 2
    for _ in range(3):
        ends = []
        for k in range(2):
            w, v, a = server, own[k], share[k]
            for step in range(3):
                w = w - lr * task.gradient(k, w)
                h = task.gradient(k, a * v + (1 - a) * w)
                new = v - lr * a * h
                if step == 0:
                    a = min(1.0, max(0.0, a - lr * (float(h @ (v - w)) + mu * a)))
                v = new
            ends.append(w)
            own[k], share[k] = v, a
        server = sum(ends) / 2
    for k in range(2):
        state = made.engine.states[k]
        assert torch.allclose(state["personal"].flat, own[k], rtol=0, atol=1e-12)
        assert state["alpha"] == pytest.approx(share[k], abs=1e-12) and state["alpha"] != 0.4


def test_the_slope_of_the_share_is_the_inner_product():
    task = Quadratics(sizes=(4, 4))
    client = node(ran(FedAvg(), task, rounds=1).site, 0)
    v, w = client.initial + 1.0, client.initial - 0.5
    batch = client.data.all()
    value = lambda a: float(task.loss(client.net(a * v + (1 - a) * w), batch))  # noqa: E731 - a formula
    slope = client.grad(0.3 * v + 0.7 * w, batch) @ (v - w)
    assert (value(0.3 + 1e-5) - value(0.3 - 1e-5)) / 2e-5 == pytest.approx(float(slope), rel=1e-6)


def test_a_share_of_zero_judges_the_local_copy_of_the_global_model():
    made = ran(APFL(alpha=0.0, adaptive=False), Toy(), rounds=2)
    for k, state in made.engine.states.items():
        client = node(made.site, k)
        client.state.update(state)
        assert torch.equal(made.method.predict(client, made.server.model).flat, state["last"].flat)
        assert torch.equal(state["personal"].params.flat, made.site.initial.params.flat), "v never moves"


def test_a_share_of_one_is_local_training_on_the_same_batches():
    site = ran(FedAvg(), Toy(), rounds=1).site
    w = site.initial
    for round in (1, 2, 3):
        client = node(site, 0, round)
        for batch in client.batches(10, 1):
            w = w - 0.05 * client.grad(w, batch)
    personal = ran(APFL(alpha=1.0, adaptive=False), Toy(), rounds=3).engine.states[0]["personal"]
    torch.testing.assert_close(personal.flat, w.flat)
