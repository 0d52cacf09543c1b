"""FedDyn: the first-order conditions of its local problems, and its fixed point."""

import pytest
import torch
from problems import UNHEARD, Quadratics, ran, settled_by_those_heard

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.feddyn import FedDyn
from fedloom.tasks.toy import Toy


@pytest.mark.parametrize("cohort", [4, 2])
def test_h_is_the_mean_of_the_clients_gradients(cohort):
    # g_k is 0 for a client that was never asked, so this holds under partial participation too.
    made = ran(FedDyn(lr=0.1, epochs=2), Toy(), rounds=3, cohort=cohort)
    gradients = [state["gradient"].flat for state in made.engine.states.values()]
    assert made.server.h.norm() > 0.01
    assert torch.allclose(made.server.h.flat, sum(gradients) / 4, rtol=0, atol=1e-6)


def test_solved_exactly_it_is_the_papers_recursion():
    task, alpha = Quadratics(), 0.7
    made = ran(FedDyn(lr=0.2, epochs=120, batch=0, alpha=alpha), task, rounds=3)
    one, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    w, h, own = zero, zero, [zero, zero]
    for _ in range(3):
        solved = []
        for k in range(2):  # the argmin: H(v - c) - g + alpha (v - w) = 0
            pull = task.curvatures[k] @ task.centers[k] + own[k] + alpha * w
            solved.append(torch.linalg.solve(task.curvatures[k] + alpha * one, pull))
            own[k] = own[k] - alpha * (solved[k] - w)
        h = h - alpha / 2 * sum(v - w for v in solved)
        w = sum(solved) / 2 - h / alpha
    assert torch.allclose(made.server.model.flat, w, rtol=0, atol=1e-8)
    for k in range(2):
        assert torch.allclose(made.engine.states[k]["gradient"].flat, own[k], rtol=0, atol=1e-8)
        assert torch.allclose(own[k], task.gradient(k, solved[k]), rtol=0, atol=1e-8)


def test_few_local_steps_lead_to_the_optimum_of_the_plain_mean():
    task = Quadratics()
    made = ran(FedDyn(lr=0.2, epochs=5, batch=0, alpha=1.0), task, rounds=80)
    w = made.server.model.flat
    assert torch.allclose(w, task.optimum([1, 1]), rtol=0, atol=1e-6)
    for k in range(2):
        assert torch.allclose(made.engine.states[k]["gradient"].flat, task.gradient(k, w), rtol=0, atol=1e-5)
    assert made.server.h.norm() < 1e-5


def test_running_statistics_take_no_correction():
    made = ran(FedDyn(), Toy(norm=True), rounds=3)
    assert made.server.h.layout == made.server.model.params.layout
    assert made.server.model["body.1.running_var"].min() > 0


def test_alpha_of_zero_is_refused():
    with pytest.raises(UsageError, match="greater than 0"):
        FedDyn(alpha=0.0)


@pytest.mark.parametrize("fate", UNHEARD, ids=str)
def test_a_reply_that_does_not_count_moves_neither_side(fate):
    assert settled_by_those_heard(FedDyn(lr=0.3, epochs=3, batch=0, alpha=1.0), "gradient", **fate)


def test_with_its_defaults_the_correction_does_not_run_away():
    def length(method):
        return float(ran(method, Toy(sizes=(30, 22)), rounds=20).server.model.norm())

    plain = length(FedAvg(epochs=5))
    assert 0.8 * plain < length(FedDyn()) < 1.2 * plain
    assert length(FedDyn(alpha=0.1)) > 2 * plain, "as it does where a round's work does not go far enough"
