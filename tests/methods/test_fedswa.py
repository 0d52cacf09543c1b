"""FedSWA and FedMoSWA: a rate that falls within the round, and controls that are averaged with a momentum."""

import pytest
import torch
from problems import Quadratics, ran

from fedloom.methods.optimize.fedswa import FedSWA
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.node import Client
from fedloom.tasks.toy import Toy

PLAIN = {"clip": 1e9, "weight_decay": 0.0}


def rates(lr, rho, steps):
    return [(1 - k / steps) * lr + k / steps * rho * lr for k in range(steps)]


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_rounds_of_fedswa_by_hand(alpha, decay):
    task, lr, rho = Quadratics(sizes=(4, 12)), 0.2, 0.25
    method = FedSWA(lr, epochs=2, batch=4, rho=rho, alpha=alpha, clip=1e9, weight_decay=decay)
    x = torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        reached = []
        for k, steps in enumerate((2, 6)):
            y = x
            for rate in rates(lr, rho, steps):
                y = y - rate * (task.gradient(k, y) + decay * y)
            reached.append(y)
        x = x + alpha * (sum(reached) / 2 - x)
    assert torch.allclose(ran(method, task, rounds=3).server.model.flat, x, rtol=0, atol=1e-12)


def test_rounds_of_fedmoswa_by_hand():
    task, lr, rho, alpha, gamma, decay = Quadratics(sizes=(4, 12)), 0.1, 0.25, 1.5, 0.3, 0.2
    method = FedSWA(lr, 2, 4, rho, alpha, "moswa", gamma, clip=0.8, weight_decay=decay)
    made = ran(method, task, rounds=3)
    x, m = (torch.zeros(2, dtype=torch.float64) for _ in range(2))
    own = [torch.zeros(2, dtype=torch.float64)] * 2
    for round in range(3):
        reached, new = [], []
        for k, steps in enumerate((2, 6)):
            y = x
            for rate in rates(lr, rho, steps):
                g = task.gradient(k, y)
                g = g * min(1.0, 0.8 / float(g.norm()))  # clipped before the controls are added
                y = y - rate * (g - own[k] + m + decay * y)
            reached.append(y)
            new.append(own[k] - m + (x - y) / sum(rates(lr, rho, steps)))
        m = m + (gamma if round else 1.0) * (sum(new) / 2 - m)
        own, x = new, x + alpha * (sum(reached) / 2 - x)
    assert torch.allclose(made.server.model.flat, x, rtol=0, atol=1e-12)
    assert torch.allclose(made.server.control.flat, m, rtol=0, atol=1e-12)
    for k in range(2):
        assert torch.allclose(made.engine.states[k]["control"].flat, own[k], rtol=0, atol=1e-12)


def test_at_a_constant_rate_the_clients_are_scaffolds():
    """From one model and one server control, steps and controls are the same bits; only the servers differ."""
    task = Toy()
    made = ran(Scaffold(lr=0.1, epochs=2), task, rounds=2)
    scaffold, moswa = Scaffold(lr=0.1, epochs=2), FedSWA(0.1, 2, rho=1.0, variant="moswa", **PLAIN)
    for k in range(task.population):
        state, sent = made.engine.states[k], {"model": made.server.model, "control": made.server.control}
        one, other = (Client(made.site, k, dict(state), "train", 3) for _ in range(2))
        first, second = scaffold.local(one, **sent), moswa.local(other, **sent)
        torch.testing.assert_close(first["delta"].flat, second["delta"].flat)
        torch.testing.assert_close(one.state["control"].flat, other.state["control"].flat, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second["shift"].flat, (other.state["control"] - made.server.control).flat)


def test_fedmoswas_controls_undo_client_drift_and_fedswa_drifts():
    task = Quadratics()
    settled = {}
    for variant in ("swa", "moswa"):
        method = FedSWA(0.1, 8, 0, rho=0.5, variant=variant, gamma=0.5, **PLAIN)
        settled[variant] = ran(method, task, rounds=80).server.model.flat
    assert torch.allclose(settled["moswa"], task.optimum([1, 1]), rtol=0, atol=1e-6)
    assert (settled["swa"] - task.optimum([1, 1])).norm() > 0.05


def test_running_statistics_are_averaged_whatever_alpha_is():
    task = Toy(norm=True)
    whole, half = (ran(FedSWA(alpha=alpha), task, rounds=1).server.model for alpha in (1.0, 0.5))
    assert torch.equal(whole.buffers.flat, half.buffers.flat) and not torch.equal(whole.params.flat, half.params.flat)


def test_the_control_travels_only_where_it_is_used():
    plain, controlled = (ran(FedSWA(variant=variant), Toy(), rounds=1) for variant in ("swa", "moswa"))
    fields = [{line["field"] for line in made.record.ledger if line["kind"] == "train"} for made in (plain, controlled)]
    assert fields[0].isdisjoint({"control", "shift"}) and {"control", "shift"} <= fields[1]
    assert all("control" not in state for state in plain.engine.states.values())
