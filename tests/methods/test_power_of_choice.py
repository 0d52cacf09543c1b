"""Power-of-Choice: the highest losses among some, drawn by size, around any method."""

import pytest
import torch
from problems import node, ran

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.methods.participate.power_of_choice import PowerOfChoice
from fedloom.tasks.toy import Toy

TEN = Toy(sizes=(10, 20, 30, 12, 25, 18, 22, 16, 28, 14))


def cohorts(made, function):
    lines = [line for line in made.record.ledger if line["direction"] == "down" and line["function"] == function]
    return {line["round"]: sorted(line["clients"]) for line in lines if line["field"] == "model"}


def test_of_all_candidates_those_with_the_highest_loss_take_part():
    made = ran(PowerOfChoice(candidates=10, chosen=3), TEN, 1)
    task, w = made.site.task, made.site.initial
    losses = {}
    for k in range(10):
        batch = task.data(k, "train").all()
        losses[k] = float(task.criterion(node(made.site, k).scores(w, batch.x), batch))
    assert cohorts(made, "inner.local")[1] == sorted(sorted(losses, key=losses.get)[-3:])
    assert cohorts(made, "judge")[1] == list(range(10))


def test_the_whole_population_is_the_inner_method():
    for inner in (FedAvg(lr=0.1), Scaffold(lr=0.1)):
        made, plain = ran(PowerOfChoice(inner=inner, candidates=10, chosen=10), TEN, 3), ran(inner, TEN, 3)
        assert torch.equal(made.server.model.flat, plain.server.model.flat)


def test_candidates_are_drawn_by_their_samples():
    made = ran(PowerOfChoice(candidates=1, chosen=1), Toy(sizes=(5, 60, 5, 10)), 60)
    asked = [k for clients in cohorts(made, "inner.local").values() for k in clients]
    assert len(asked) == 60 and 36 <= asked.count(1) <= 57, "three quarters are expected"


def test_a_loss_may_be_of_a_few_samples():
    made = ran(PowerOfChoice(candidates=10, chosen=3, sample=4), TEN, 1)
    w, losses = made.site.initial, {}
    for k in range(10):
        client = node(made.site, k)
        batch = next(client.batches(4))
        losses[k] = float(made.site.task.criterion(client.scores(w, batch.x), batch))
        assert made.method.judge(node(made.site, k), w)["loss"] == pytest.approx(losses[k])
    assert cohorts(made, "inner.local")[1] == sorted(sorted(losses, key=losses.get)[-3:])
