"""APFL: the global part, the mix, and the share that is learned."""

import pytest
import torch
from problems import Quadratics, close, descended, network, node, ran

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.personalize.apfl import APFL
from fedloom.tasks.toy import Toy


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
                h = task.gradient(k, a * v + (1 - a) * w)
                slope = float(h @ (v - w)) + mu * a
                w, v = w - lr * task.gradient(k, w), v - lr * a * h
                if step == 0:
                    a = min(1.0, max(0.0, a - lr * slope))
            ends.append(w)
            own[k], share[k] = v, a
        server = sum(ends) / 2
    for k in range(2):
        state = made.engine.states[k]
        assert torch.allclose(state["personal"].flat, own[k], rtol=0, atol=1e-12)
        assert torch.allclose(state["last"].flat, ends[k], rtol=0, atol=1e-12)
        assert state["alpha"] == pytest.approx(share[k], abs=1e-12) and state["alpha"] != 0.4
        client = node(made.site, k)
        client.state.update(state)
        judged = made.method.predict(client, made.server.model)
        assert torch.allclose(judged.flat, share[k] * own[k] + (1 - share[k]) * ends[k], rtol=0, atol=1e-12)


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


def test_the_share_stays_between_0_and_1_and_is_held_if_it_is_not_adaptive():
    task = Quadratics(sizes=(4, 4))
    for mu, end in ((1e3, 0.0), (0.0, 0.4)):
        made = ran(APFL(lr=0.05, batch=0, alpha=0.4, mu=mu, adaptive=mu > 0), task, rounds=1)
        assert all(state["alpha"] == end for state in made.engine.states.values())
    made = ran(APFL(lr=0.3, epochs=1, batch=0, alpha=0.95, mu=0.0), task, rounds=12)
    assert [state["alpha"] for state in made.engine.states.values()] == [1.0, 1.0], "each has another optimum than all"


def test_the_mix_has_statistics_of_its_own():
    task, lr = Toy(norm=True), 0.1
    made = ran(APFL(lr=lr, epochs=2, alpha=0.6, adaptive=False), task, rounds=1)
    for k, state in made.engine.states.items():
        w, v, vbar = (network(task, made.site.initial) for _ in range(3))
        for batch in node(made.site, k).batches(10, 2):
            for p, mine, its in zip(vbar.parameters(), v.parameters(), w.parameters(), strict=True):
                p.data = 0.6 * mine.data + 0.4 * its.data
            slopes = torch.autograd.grad(task.loss(vbar.train(), batch), list(vbar.parameters()))
            for p, h in zip(v.parameters(), slopes, strict=True):
                p.data -= lr * 0.6 * h
            w = descended(w, task, [batch], lr)
        statistics = {name: value for name, value in vbar.state_dict().items() if "running" in name}
        assert close(state["personal"], dict(v.state_dict()) | statistics)
        assert close(state["last"], w.state_dict())
        client = node(made.site, k)
        client.state.update(state)
        judged = made.method.predict(client, made.server.model)
        assert close(judged.buffers, statistics)
        for name, one, other in zip(dict(v.named_parameters()), v.parameters(), w.parameters(), strict=True):
            assert torch.allclose(judged[name], 0.6 * one.data + 0.4 * other.data, rtol=0, atol=1e-6)


def test_a_client_that_was_never_asked_has_the_global_model_and_begins_from_it():
    made = ran(APFL(), Toy(), rounds=2, cohort=1, seed=1)
    (first,), (second,) = made.world.choose(1), made.world.choose(2)
    never = ({0, 1, 2, 3} - {first, second}).pop()
    assert made.method.predict(node(made.site, never), made.server.model) is made.server.model
    assert first != second
    held = ran(APFL(alpha=0.0, adaptive=False), Toy(), rounds=2, cohort=1, seed=1)
    before = ran(APFL(alpha=0.0, adaptive=False), Toy(), rounds=1, cohort=1, seed=1)
    assert torch.equal(held.engine.states[second]["personal"].params.flat, before.server.model.params.flat)
