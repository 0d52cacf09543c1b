"""SCAFFOLD: what the control variates are, and that they undo client drift."""

import pytest
import torch
from problems import UNHEARD, Quadratics, network, ran, settled_by_those_heard

from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.tasks.toy import Toy


def test_after_one_full_batch_step_the_control_is_the_local_gradient():
    task, method = Toy(), Scaffold(lr=0.1, batch=0)
    before, after = ran(method, task, rounds=2), ran(method, task, rounds=3)
    for k in range(task.population):
        net = network(task, before.server.model)
        task.loss(net, task.data(k, "train").all()).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
        assert torch.allclose(after.engine.states[k]["control"].flat, gradient, rtol=0, atol=2e-6)


@pytest.mark.parametrize("cohort", [4, 2])
def test_the_servers_control_is_the_mean_of_all_clients_controls(cohort):
    # A client that was never asked has the control 0, so this holds under partial participation too.
    made = ran(Scaffold(lr=0.1, epochs=2), Toy(), rounds=3, cohort=cohort)
    controls = [state["control"].flat for state in made.engine.states.values()]
    assert len(controls) >= cohort and made.server.control.norm() > 0.1
    assert torch.allclose(made.server.control.flat, sum(controls) / 4, rtol=0, atol=1e-6)


def test_many_local_steps_lead_to_the_optimum_of_the_plain_mean():
    # Where FedAvg goes with these steps: test_fedavg.py.
    task = Quadratics()
    w = ran(Scaffold(lr=0.1, epochs=8, batch=0), task, rounds=60).server.model.flat
    assert torch.allclose(w, task.optimum([1, 1]), rtol=0, atol=1e-6)
    assert (w - task.optimum(task.sizes)).norm() > 0.1, "not that of the mean weighted by samples"


def test_rounds_by_hand():
    task, lr, rate = Quadratics(sizes=(4, 12)), 0.1, 0.5
    made = ran(Scaffold(lr=lr, epochs=2, batch=4, server_lr=rate), task, rounds=3)
    x = torch.zeros(2, dtype=torch.float64)
    control, own = torch.zeros(2, dtype=torch.float64), [torch.zeros(2, dtype=torch.float64)] * 2
    for _ in range(3):
        reached = []
        for k, steps in enumerate((2, 6)):  # of two epochs in batches of 4
            y = x
            for _ in range(steps):
                y = y - lr * (task.gradient(k, y) - own[k] + control)
            reached.append(y)
        new = [own[k] - control + (x - reached[k]) / (steps * lr) for k, steps in enumerate((2, 6))]
        control = control + sum(new[k] - own[k] for k in range(2)) / 2
        x, own = x + rate * (sum(reached) / 2 - x), new
    assert torch.allclose(made.server.model.flat, x, rtol=0, atol=1e-12)
    assert torch.allclose(made.server.control.flat, control, rtol=0, atol=1e-12)


def test_the_servers_learning_rate_scales_parameters_and_leaves_running_statistics_alone():
    task = Toy(norm=True)
    whole, half = (ran(Scaffold(server_lr=rate), task, rounds=1).server.model for rate in (1.0, 0.5))
    start = ran(Scaffold(), task, rounds=1).site.initial
    assert torch.allclose((half - start).params.flat, 0.5 * (whole - start).params.flat, rtol=0, atol=1e-6)
    assert torch.equal(half.buffers.flat, whole.buffers.flat)
    assert not torch.equal(half.buffers.flat, start.buffers.flat)


@pytest.mark.parametrize("fate", UNHEARD, ids=str)
def test_a_reply_that_does_not_count_moves_neither_side(fate):
    assert settled_by_those_heard(Scaffold(lr=0.3, epochs=3, batch=0), "control", **fate)
