"""HeteRo-Select: what the score does with each of its parts, and that without them it is FedAvg."""

import torch
from problems import ran

from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.methods.participate.hetero_select import HeteroSelect, spread
from manyhands.tasks.toy import Toy

TEN = Toy(sizes=(20,) * 10)
NONE = {"by_loss": 0.0, "by_diversity": 0.0, "by_fairness": 0.0, "by_absence": 0.0}


def test_without_a_pull_and_with_everybody_it_is_fedavg():
    # Of full batches: the second call of a round draws others than the first.
    made, fedavg = ran(HeteroSelect(mu=0.0, clip=0.0, batch=0), TEN, 3), ran(FedAvg(batch=0), TEN, 3)
    assert torch.equal(made.server.model.flat, fedavg.server.model.flat)


def test_by_fairness_alone_it_is_a_round_robin():
    made = ran(HeteroSelect(chosen=3, tau=1e-6, **NONE | {"by_fairness": 1.0}), TEN, 7)
    assert sum(made.server.times) == 21 and max(made.server.times) - min(made.server.times) <= 1
    uniform = ran(HeteroSelect(chosen=3, **NONE), TEN, 7).server.times
    assert sum(uniform) == 21 and max(uniform) - min(uniform) > 1


def test_by_loss_alone_the_highest_are_chosen():
    made = ran(HeteroSelect(chosen=3, tau=1e-6, looks=99, **NONE | {"by_loss": 1.0}), TEN, 1)
    task, net = made.site.task, made.server.net(made.site.initial)
    losses = {k: float(task.loss(net, task.data(k, "train").all())) for k in range(10)}
    assert [k for k in range(10) if made.server.times[k]] == sorted(sorted(losses, key=losses.get)[-3:])


def test_everybodys_loss_is_charged():
    made = ran(HeteroSelect(chosen=3), TEN, 2)
    ups = [line for line in made.record.ledger if line["direction"] == "up" and line["field"] == "loss"]
    assert [len(line["clients"]) for line in ups] == [10, 10]


def test_scores_are_spread_from_zero_to_one():
    assert spread([3.0, 5.0, 4.0], 1.0) == [0.0, 1.0, 0.5]
    assert spread([2.0, 2.0], 1.0) == [1.0, 1.0]
