"""FedAU: the intervals, their cutoff, and that the bias of unequal participation goes."""

from dataclasses import dataclass

import pytest
import torch
from problems import Quadratics, ran

from manyhands.intervals import Intervals
from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.methods.participate.fedau import FedAU
from manyhands.tasks.toy import Toy


def seen(rounds, cutoff):
    """The mean before each round, for one client that comes in the given rounds of the first thirty."""
    known, means = Intervals.none(1), []
    for round in range(1, 31):
        means.append(known.mean.item())
        known = known.after(round, [0] if round in rounds else [], cutoff)
    return means


def test_intervals_of_a_client_that_comes_at_times():
    assert seen(range(3, 31, 3), 50) == [1.0] * 3 + [3.0] * 27
    assert seen([1, 2, 6], 50)[:8] == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    assert seen(range(1, 31), 50) == [1.0] * 30


def test_the_cutoff_closes_intervals_without_a_visit():
    means = seen([], 4)
    assert means == [1.0] * 4 + [4.0] * 26
    assert max(seen(range(7, 31, 7), 5)) <= 5
    assert seen([], 0) == [1.0] * 30


def test_rounds_that_were_left_out_count():
    known = Intervals.none(2).after(9, [0], 4)
    assert known.mean.tolist() == pytest.approx([3.0, 4.0]), "4, 4, 1; and 4, 4"
    assert known.last.tolist() == [9, 8] and known.closed.tolist() == [3, 2]


def test_everybody_in_every_round_is_fedavg_with_equal_weights():
    task = Toy(sizes=(32,) * 4, norm=True)
    made, fedavg = (ran(m(lr=0.1, batch=10), task, 3).server.model for m in (FedAU, FedAvg))
    assert torch.allclose(made.flat, fedavg.flat, rtol=0, atol=3e-6)


def test_the_weights_undo_the_bias():
    task = Quadratics((8, 8))
    trace = {"availability": "bernoulli:0.3,1.0", "seed": 3}
    target = task.optimum([1, 1])

    def distance(cls, **fields):
        ends = []

        @dataclass(frozen=True)
        class Watched(cls):
            def observe(self, server, clients):
                ends.append(server.model.flat)

        ran(Watched(lr=0.02, batch=0, **fields), task, 400, eval_every=10, **trace)
        return (sum(ends[20:]) / len(ends[20:]) - target).norm()

    assert distance(FedAU, cutoff=0) < 0.5 * distance(FedAvg)


def test_absent_clients_add_nothing_and_the_sum_is_over_all():
    task = Toy(sizes=(32,) * 4)
    one = ran(FedAU(lr=0.1, batch=10), task, 1, cohort=1)
    alone = ran(FedAvg(lr=0.1, batch=10), task, 1, cohort=1)
    start = one.site.initial
    assert torch.allclose((one.server.model - start).flat, 0.25 * (alone.server.model - start).flat, atol=1e-6)
