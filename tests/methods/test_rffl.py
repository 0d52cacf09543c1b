"""RFFL: how models move, what reputation is, who is removed and when, and what a reward holds."""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from problems import Quadratics, node, ran

from manyhands.method import client
from manyhands.methods.robust.rffl import Rffl, largest
from manyhands.random import stream
from manyhands.tasks.toy import Toy
from manyhands.vector import Layout


@dataclass(frozen=True)
class OneLies(Rffl):
    """Client 0 uploads the opposite of what it found."""

    @client
    def local(self, client):
        reply = Rffl.local(self, client)
        return {"delta": -reply["delta"]} if client.id == 0 else reply


def test_without_reputation_and_masking_a_client_moves_by_its_own_step_and_the_weighted_sum_of_all():
    task, lr, decay, epochs = Quadratics(), 0.1, 0.9, 2
    fields = {"lr": lr, "lr_decay": decay, "epochs": epochs, "batch": 0, "clip": 100.0}
    made = ran(Rffl(**fields, reputation=False, masking=False), task, rounds=3)
    models = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
    for round in range(3):
        steps = []
        for k in range(2):
            w = models[k]
            for epoch in range(epochs):
                w = w - lr * decay ** (round * epochs + epoch) * task.gradient(k, w)
            steps.append(w - models[k])
        everybody = sum(n * g for n, g in zip(task.sizes.tolist(), steps, strict=True)) / task.sizes.sum()
        models = [w + g + everybody for w, g in zip(models, steps, strict=True)]
    for k in range(2):
        assert torch.allclose(made.engine.states[k]["model"].flat, models[k], rtol=0, atol=1e-12)
    assert not torch.allclose(models[0], models[1]), "clients keep models of their own"


def test_the_upload_is_clipped_as_a_whole_and_the_own_model_follows_it():
    task = Toy(norm=True)
    made = ran(Rffl(), task, rounds=1)
    for clip in (0.05, 1e6):
        one = node(made.site, 1, round=2)
        start = one.state["model"] = made.engine.states[1]["model"]
        one.state["epochs"] = 3
        delta = Rffl(clip=clip).local(one)["delta"]
        assert torch.allclose(one.state["model"].params.flat, start.params.flat + delta.flat)
        if clip < 1:
            assert delta.norm().item() == pytest.approx(clip, rel=1e-5)
        else:
            assert delta.norm() > 0.05
    assert not torch.equal(one.state["model"].buffers.flat, start.buffers.flat), "running statistics are the client's"


def test_reputation_is_a_moving_average_of_cosines_with_two_normalisations():
    method = Rffl(alpha=0.9, threshold=0.5, grace=3)
    server = SimpleNamespace(reputation={}, removed=[], round=0, population=4)
    r, inside = [0.0] * 4, [True] * 4
    draw = stream(0, "test")
    for t in range(8):
        phi = (torch.rand(4, generator=draw) - 0.1).tolist()
        phi[2] = -0.3
        server.round = t + 1
        server.reputation, server.removed = method.judge(server, dict(enumerate(phi)))
        r = [0.9 * old + 0.1 * new if stays else 0.0 for old, new, stays in zip(r, phi, inside, strict=True)]
        r = [value / sum(r) for value in r]
        if t >= 3:
            beta = 0.5 / sum(inside)
            inside = [stays and value >= beta for value, stays in zip(r, inside, strict=True)]
            r = [value if stays else 0.0 for value, stays in zip(r, inside, strict=True)]
            r = [value / sum(r) for value in r]
        assert [server.reputation[k] for k in range(4)] == pytest.approx(r)
        assert server.removed == [k for k in range(4) if not inside[k]]
        assert t < 3 or 2 in server.removed


def test_a_liar_is_removed_at_the_first_check_and_never_earlier():
    task = Toy(sizes=(30,) * 8)
    before, after, later = (ran(OneLies(), task, rounds=rounds) for rounds in (10, 11, 14))
    assert before.server.removed == [] and before.server.reputation[0] < 0
    assert after.server.removed == [0] and after.server.reputation[0] == 0
    assert later.server.removed == [0]
    assert sum(later.server.reputation.values()) == pytest.approx(1)


def test_a_removed_client_gets_nothing_but_is_still_asked():
    made = ran(OneLies(), Toy(sizes=(30,) * 8), rounds=13)
    rewards = [
        line
        for line in made.record.ledger
        if line["field"] == "reward" and line["round"] == 13 and 0 in line["clients"]
    ]
    others = [line for line in made.record.ledger if line["field"] == "reward" and line["round"] == 13]
    assert len(rewards) == 1
    assert rewards[0]["bytes"] == min(line["bytes"] for line in others) < 40
    assert made.engine.states[0]["epochs"] == 13 * 3


def test_a_reward_is_the_largest_entries_of_every_layer():
    layout = Layout.of(Toy().network())
    g = torch.randn(layout.size, generator=stream(0, "test"))
    sizes = []
    for share in (0.0, 0.1, 0.33, 0.7, 1.0):
        dense = largest(g, layout, share).dense()
        for part, whole in zip(layout.views(dense), layout.views(g), strict=True):
            kept = part != 0
            assert kept.sum() == math.ceil(share * whole.numel())
            assert torch.equal(part[kept], whole[kept])
            if kept.any() and not kept.all():
                assert whole[kept].abs().min() >= whole[~kept].abs().max()
        sizes.append(int((dense != 0).sum()))
    assert sizes == sorted(sizes) and sizes[-1] == layout.size


def test_the_best_client_gets_all_and_rewards_follow_reputation():
    made = ran(Rffl(), Toy(sizes=(60, 30, 15, 8)), rounds=5)
    r = made.server.reputation
    lines = [line for line in made.record.ledger if line["field"] == "reward" and line["round"] == 5]
    size = {k: line["bytes"] for line in lines for k in line["clients"]}
    best = max(r, key=r.get)
    assert size[best] > 4 * Toy().network().body[0].weight.numel()
    ranked = sorted(r, key=r.get)
    assert all(size[a] <= size[b] + 8 for a, b in itertools.pairwise(ranked))  # the index costs a little
    assert size[ranked[0]] < size[best]


def test_only_who_was_heard_is_judged():
    made = ran(Rffl(grace=1), Toy(sizes=(30,) * 8), rounds=3, cohort=2, seed=3)
    asked = {k for round in (1, 2, 3) for k in made.world.choose(round)}
    assert set(made.server.reputation) == asked
    assert set(made.server.removed) <= asked
