"""HeteRo-Select: what the score does with each of its parts, and that without them it is FedAvg."""

import math

import pytest
import torch
from problems import node, ran

from fedloom.cohort import Reply
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.methods.participate.hetero_select import HeteroSelect, spread
from fedloom.tasks.toy import Toy

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


def minmax(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) for v in values]


def test_the_score_is_the_formula_of_the_box():
    made = ran(HeteroSelect(), Toy(sizes=(20,) * 4), 1)
    server, method = made.server, HeteroSelect(by_loss=0.9, by_diversity=0.4, by_fairness=0.3, by_absence=0.2)
    server.times, server.last, server.apart = [3, 0, 1, 4], [7, 0, 2, 5], [0.1, 0.5, 0.9, 0.3]
    server.begin("train", 9)
    losses = [2.0, 0.5, 1.0, 1.5]
    found = method.scores(server, [Reply(k, {"loss": loss}) for k, loss in enumerate(losses)])
    v, st = minmax(losses), minmax([math.log(1 + 9 - last) for last in (7, 0, 2, 5)])
    fair = [max(-1, min(1, 1 - c / 2.0)) for c in (3, 0, 1, 4)]
    s = [0.9 * v[k] + 0.4 * (0.1, 0.5, 0.9, 0.3)[k] + 0.3 * fair[k] + 0.2 * st[k] for k in range(4)]
    assert found == pytest.approx(minmax(s))


def test_diversity_and_the_running_mean_by_hand():
    """D = clip(1 - cos(u_k, mean u), 0, 1); mean u <- 0.9 mean u + 0.1 mean_k u_k, the first as it is; by samples."""
    method, task = HeteroSelect(mu=0.5, clip=0.0, batch=0, lr=0.3), Toy(sizes=(10, 40, 25))
    one, two = (ran(method, task, rounds) for rounds in (1, 2))
    models = [one.site.initial, one.server.model, two.server.model]
    updates = []
    for round in (1, 2):
        start = models[round - 1]
        ends = [node(one.site, k, round).descend(start, lr=0.3, steps=1)[0] for k in range(3)]
        updates.append([(w - start).params.flat for w in ends])  # in one step the pull is zero
    mean = sum(updates[0]) / 3
    assert torch.allclose(one.server.mean.flat, mean, atol=1e-6)
    second = 0.9 * mean + 0.1 * sum(updates[1]) / 3
    assert torch.allclose(two.server.mean.flat, second, atol=1e-6)
    cosines = [torch.nn.functional.cosine_similarity(u, mean, dim=0).item() for u in updates[1]]
    assert two.server.apart == pytest.approx([min(1.0, max(0.0, 1 - c)) for c in cosines], abs=1e-4)
    weighted = (10 * updates[0][0] + 40 * updates[0][1] + 25 * updates[0][2]) / 75
    assert torch.allclose((models[1] - models[0]).params.flat, weighted, atol=1e-6)


def test_the_pull_is_fedproxs_and_gradients_are_bounded():
    fields = {"lr": 0.2, "epochs": 3, "batch": 0}
    made, prox = ran(HeteroSelect(mu=2.0, clip=0.0, **fields), TEN, 1), ran(FedProx(mu=2.0, **fields), TEN, 1)
    assert torch.allclose(made.server.model.flat, prox.server.model.flat, atol=1e-6)
    bounded = ran(HeteroSelect(mu=0.0, clip=1e-3, **fields), TEN, 1)
    assert (bounded.server.model - bounded.site.initial).norm() <= 0.2 * 3 * 1e-3 * 1.001


@pytest.mark.parametrize(("round", "tau"), [(1, 0.995), (50, 0.75), *((r, 0.5) for r in (*range(100, 130), 400))])
def test_the_draw_is_a_softmax_without_replacement_that_cools_down(round, tau):
    made = ran(HeteroSelect(chosen=4, horizon=100), TEN, 1)
    method, server = made.method, made.server
    score = [0.4 * k for k in range(10)]
    object.__setattr__(method, "scores", lambda server, heard: score)
    server.begin("train", round)
    chosen = method.select(server, made.everybody)
    server.begin("train", round)
    noise = torch.rand(10, generator=server.rng("choice"), dtype=torch.float64)
    keys = [s / tau - math.log(-math.log(u)) for s, u in zip(score, noise.tolist(), strict=True)]
    assert list(chosen) == sorted(sorted(range(10), key=keys.__getitem__)[-4:])


def test_a_loss_is_of_so_many_batches():
    made = ran(HeteroSelect(looks=2, batch=5), TEN, 1)
    client = node(made.site, 3)
    batches = [batch for batch, _ in zip(client.batches(5), range(2), strict=False)]
    losses = [float(TEN.criterion(client.scores(made.site.initial, b.x), b)) for b in batches]
    again = node(made.site, 3)
    assert made.method.look(again, made.site.initial)["loss"] == pytest.approx(sum(losses) / 2)
