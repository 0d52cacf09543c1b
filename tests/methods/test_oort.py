"""Oort: utility, exploration of the unknown, and that slow clients weigh less."""

import numpy as np
import pytest
import torch
from problems import node, ran

from fedloom.methods.participate.oort import Oort
from fedloom.tasks.toy import Toy

TEN = Toy(sizes=(20,) * 10)


def test_utility_is_the_root_mean_square_of_single_losses():
    made = ran(Oort(chosen=10), TEN, 1)
    task, w = made.site.task, made.site.initial
    for k in (0, 7):
        x, y = task.data(k, "train").all()
        losses = torch.nn.functional.cross_entropy(node(made.site, k).scores(w, x), y, reduction="none")
        assert made.server.utility[k] == pytest.approx(20 * float(losses.detach().square().mean().sqrt()), rel=1e-5)


def test_everybody_unknown_is_explored_first():
    assert set(ran(Oort(chosen=5, explore=1.0, fading=1.0), TEN, 2).server.tried) == set(range(10))
    greedy = ran(Oort(chosen=5, explore=0.0, least=0.0), TEN, 6).server.tried
    assert len(greedy) == 5, "without exploration the first ones stay"


def test_slow_clients_and_small_losses_score_less():
    made = ran(Oort(chosen=10), TEN, 1)
    server = made.server
    server.utility = {0: 1.0, 1: 5.0, 2: 3.0, 3: 3.0}
    server.tried = dict.fromkeys(range(4), 1)
    took = {0: 1.0, 1: 1.0, 2: 1.0, 3: 4.0}
    score = Oort(quantile=0.5).scores(server, [0, 1, 2, 3], took)
    assert score[0] < score[2] < score[1]
    assert score[3] == pytest.approx(score[2] / 16)


def test_the_fast_are_asked_more_often():
    def fast(alpha):
        made = ran(Oort(chosen=2, alpha=alpha, explore=0.3), TEN, 30, speed="classes:1x0.5,10x0.5")
        lines = [line for line in made.record.ledger if line["direction"] == "down"]
        lines = [line for line in lines if line["function"] == "inner.local" and line["field"] == "model"]
        asked = [k for line in lines for k in line["clients"]]
        assert len(asked) == 60
        return sum(made.world.profile(k)["speed"] == 10 for k in asked)

    assert fast(5.0) > fast(0.0) + 10


def test_the_unknown_are_explored_by_their_speed_not_by_their_size():
    def first(sizes, seed, **settings):
        made = ran(Oort(chosen=1, explore=1.0), Toy(sizes=sizes), 1, seed=seed, **settings)
        (k,) = made.server.tried
        return made, k

    fast = 0
    for seed in range(30):
        made, k = first((60, 60, 10, 10), seed, speed="classes:1x0.5,9x0.5")
        fast += made.world.profile(k)["speed"] == 9
    assert fast >= 22, "nine in ten are expected"
    small = sum(first((60, 60, 5, 5), seed)[1] >= 2 for seed in range(30))
    assert 7 <= small <= 23, "clients of one speed are alike"


def test_who_has_told_no_utility_stays_unknown():
    made = ran(Oort(chosen=4, explore=1.0), TEN, 4, lost=0.5)
    assert set(made.server.tried) == set(made.server.utility) and 0 not in made.server.utility.values()
    heard = {
        k
        for line in made.record.ledger
        if line["function"] == "judge" and line["field"] == "utility"
        for k in line["clients"]
    }
    assert set(made.server.tried) < heard, "the ledger has the lost ones too"


def test_the_score_is_the_formula_of_the_box():
    made = ran(Oort(chosen=10), TEN, 1)
    server = made.server
    server.begin("train", 20)
    server.utility = dict(enumerate([1.0, 9.0, 4.0, 6.0, 40.0]))
    server.tried = dict(enumerate([2, 19, 7, 11, 5]))
    took = dict(enumerate([1.0, 2.0, 3.0, 4.0, 8.0]))
    found = Oort(alpha=1.5, quantile=0.5).scores(server, list(range(5)), took)
    most = np.quantile([1.0, 9.0, 4.0, 6.0, 40.0], 0.95)
    useful = np.minimum([1.0, 9.0, 4.0, 6.0, 40.0], most)
    ago = np.sqrt(0.1 * np.log(20) / np.array([2, 19, 7, 11, 5]))
    slow = np.array([1.0, 1.0, 1.0, (3 / 4) ** 1.5, (3 / 8) ** 1.5])
    expected = ((useful - useful.min()) / (useful.max() - useful.min()) + ago) * slow
    assert list(found.values()) == pytest.approx(expected.tolist())


def test_who_may_be_drawn_and_how_many_explore(monkeypatch):
    from fedloom.methods.participate import oort

    made = ran(Oort(chosen=4, explore=0.5, fading=0.9, least=0.25), TEN, 1)
    server, method = made.server, made.method
    asked = []
    monkeypatch.setattr(
        oort, "drawn", lambda weights, count, g: asked.append((dict(weights), count)) or [*weights][:count]
    )
    score = {0: 1.0, 1: 0.98, 2: 0.97, 3: 0.94, 4: 0.92, 5: 0.5}
    object.__setattr__(method, "scores", lambda server, known, took: score)
    for round, fresh in ((1, 2), (3, 2), (5, 1), (40, 1)):  # 4 x 0.5 x 0.9^(t - 1), and a quarter at the least
        server.begin("train", round)
        server.tried, server.utility = dict.fromkeys(score, 1), dict(score)
        asked.clear()
        method.select(server, made.everybody)
        (new, explored), (able, exploited) = asked
        assert (set(new), explored, exploited) == ({6, 7, 8, 9}, fresh, 4 - fresh)
        last = sorted(score.values(), reverse=True)[4 - fresh - 1]
        assert set(able) == {k for k, value in score.items() if value >= 0.95 * last}
