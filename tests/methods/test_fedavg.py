"""FedAvg against averaging by hand, and against the fixed point that its local steps lead to."""

import pytest
import torch
from problems import Quadratics, averaged_by_hand, close, ran

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.tasks.toy import Toy


@pytest.mark.parametrize("norm", [False, True])
def test_is_averaging_by_hand(norm):
    task = Toy(norm=norm)
    model = ran(FedAvg(lr=0.1, epochs=2, batch=10), task, rounds=3).server.model
    assert close(model, averaged_by_hand(task, 3, lr=0.1, epochs=2, batch=10)[0])


def test_lost_replies_leave_the_average_of_the_others():
    task = Toy()
    made = ran(FedAvg(lr=0.1), task, rounds=2, lost=0.5)
    lost = [made.world.loses(round, 0, k) for round in (1, 2) for k in range(4)]
    assert 0 < sum(lost) < 8 and not all(lost[:4]) and not all(lost[4:])
    by_hand = averaged_by_hand(
        task, 2, lr=0.1, epochs=1, batch=10, arrives=lambda round, k: not made.world.loses(round, 0, k)
    )
    assert close(made.server.model, by_hand[0])


def test_local_steps_move_the_fixed_point_away_from_the_optimum():
    task, lr, epochs = Quadratics(), 0.1, 8
    w = ran(FedAvg(lr=lr, epochs=epochs, batch=0), task, rounds=60).server.model.flat
    fixed = task.balance([n * task.shrinkage(k, lr, epochs) for k, n in enumerate(task.sizes)])
    assert torch.allclose(w, fixed, rtol=0, atol=1e-7)
    assert (w - task.optimum(task.sizes)).norm() > 0.1


def test_one_full_batch_step_a_round_is_descent_on_the_weighted_sum():
    task = Quadratics()
    w = ran(FedAvg(lr=0.3, batch=0), task, rounds=60).server.model.flat
    assert torch.allclose(w, task.optimum(task.sizes), rtol=0, atol=1e-7)
