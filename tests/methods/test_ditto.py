"""Ditto: the personal step, its limits, and what is judged."""

import pytest
import torch
from problems import Quadratics, node, ran

from fedloom.methods.personalize.ditto import Ditto
from fedloom.tasks.toy import Toy


def test_the_pull_is_towards_the_global_model_as_it_was_received():
    task, lr, lam = Quadratics(sizes=(5, 5)), 0.1, 0.5
    made = ran(Ditto(lr=lr, epochs=2, personal_epochs=3, batch=0, lam=lam), task, rounds=2)
    w = torch.zeros(2, dtype=torch.float64)
    personal = [w, w]
    for _ in range(2):
        for k in range(2):
            for _ in range(3):
                pull = lam * (personal[k] - w)
                personal[k] = personal[k] - lr * (task.gradient(k, personal[k]) + pull)
        w = w + sum(task.shrinkage(k, lr, 2) @ (task.centers[k] - w) for k in range(2)) / 2
    assert torch.allclose(made.server.model.flat, w, rtol=0, atol=1e-12)
    for k in range(2):
        assert torch.allclose(made.engine.states[k]["personal"].flat, personal[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", [0.2, 4.0])
def test_personal_models_settle_between_their_own_and_the_global_optimum(lam):
    task = Quadratics()
    made = ran(Ditto(lr=0.2, batch=0, lam=lam), task, rounds=80)
    w = task.optimum(task.sizes)
    for k in range(2):
        own = task.curvatures[k]
        between = torch.linalg.solve(own + lam * torch.eye(2, dtype=torch.float64), own @ task.centers[k] + lam * w)
        assert torch.allclose(made.engine.states[k]["personal"].flat, between, rtol=0, atol=1e-5)


def test_a_large_lambda_holds_the_personal_model_at_the_global_one():
    task = Quadratics()
    made = ran(Ditto(lr=1e-3, epochs=20, personal_epochs=200, batch=0, lam=900.0), task, rounds=5)
    for k in range(2):
        held, own = made.engine.states[k]["personal"].flat, task.centers[k]
        assert (held - made.server.model.flat).norm() < 0.05 * (held - own).norm()


def test_the_personal_model_is_judged_and_never_sent():
    made = ran(Ditto(), Toy(), rounds=2)
    for k, state in made.engine.states.items():
        client = node(made.site, k)
        client.state = state
        assert made.method.predict(client, made.server.model) is state["personal"]
    assert {line["field"] for line in made.record.ledger if line["direction"] == "up" and line["kind"] == "train"} == {
        "delta",
        "n",
        "envelope",
    }
    assert made.method.predict(node(made.site, 0), made.server.model) is made.server.model, "a client not yet asked"
