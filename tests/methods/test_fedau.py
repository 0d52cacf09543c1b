"""FedAU: the intervals, their cutoff, and that the bias of unequal participation goes."""

from dataclasses import dataclass

import pytest
import torch
from problems import Quadratics, ran

from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.participate._intervals import Intervals
from fedloom.methods.participate.fedau import FedAU
from fedloom.tasks.toy import Toy


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


@pytest.mark.parametrize("cutoff", [4, 0])
def test_the_weights_that_are_sent_are_those_of_intervals_counted_by_hand(cutoff):
    """An interval closes when its client is heard or when it is K long, and counts from the next round on."""
    sent = {}

    @dataclass(frozen=True)
    class Watched(FedAU):
        @client
        def local(self, client, model, omega):
            sent.setdefault(client.round, {})[client.id] = omega
            return FedAU.local(self, client, model, omega)

    made = ran(Watched(cutoff=cutoff), Toy(), 40, availability="bernoulli:0.3,0.9", lost=0.4, seed=2)
    kept = dict.fromkeys(range(4), (0, 0, 1.0))  # round of the last visit, intervals, their mean
    for round in range(1, 41):
        asked = sent.get(round, {})
        assert asked == pytest.approx({k: kept[k][2] for k in asked})
        heard = {k for k in asked if not made.world.loses(round, 0, k)}
        for k, (last, closed, mean) in kept.items():
            length = round - last
            if k in heard or (cutoff and length == cutoff):
                kept[k] = (round, closed + 1, (closed * mean + length) / (closed + 1))
    assert max(mean for _, _, mean in kept.values()) > 1.5
