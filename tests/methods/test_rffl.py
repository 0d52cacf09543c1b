"""RFFL: how models move, what reputation is, who is removed and when, and what a reward holds."""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import Quadratics, node, ran

from fedloom.method import client
from fedloom.methods.robust.rffl import Rffl, largest
from fedloom.random import stream
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout


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


@pytest.mark.parametrize("weak", [0.0, 0.25, 0.35, 0.42, 0.5])
def test_reputation_is_a_moving_average_of_cosines_with_two_normalisations(weak):
    method = Rffl(alpha=0.9, threshold=0.5, grace=3)
    server = SimpleNamespace(reputation={}, removed=[], round=0, population=4)
    r, inside = [0.0] * 4, [True] * 4
    draw = stream(0, "test")
    for t in range(12):
        phi = (0.9 + 0.1 * torch.rand(4, generator=draw)).tolist()
        phi[2] = -0.3 if t < 4 else 0.9  # removed, it repents
        phi[3] *= weak
        server.round = t + 1
        server.reputation, server.removed = method.judge(server, dict(enumerate(phi)))
        r = [max(0.9 * old + 0.1 * new, 0) if stays else 0.0 for old, new, stays in zip(r, phi, inside, strict=True)]
        r = [value / sum(r) for value in r]
        if t >= 3:
            beta = 0.5 / sum(inside)
            inside = [stays and value >= beta for value, stays in zip(r, inside, strict=True)]
            r = [value if stays else 0.0 for value, stays in zip(r, inside, strict=True)]
            r = [value / sum(r) for value in r]
        assert [server.reputation[k] for k in range(4)] == pytest.approx(r)
        assert server.removed == [k for k in range(4) if not inside[k]]
        assert t < 3 or 2 in server.removed


@dataclass(frozen=True)
class Scripted(Rffl):
    """Uploads drawn around one direction, of length 1, whatever the data; client 0 uploads the opposite."""

    @client
    def local(self, client):
        draw = torch.randn(client.layout.size, generator=client.rng("upload"))
        upload = 0.1 + 0.02 * (client.id + 1) * draw
        upload = (-upload if client.id == 0 else upload) / upload.norm()
        client.state["model"] = client.state.get("model", client.initial)
        return {"delta": client.initial.zeros_like().map(lambda zeros: zeros + upload)}


def upload(made, round, k):
    """What a scripted client sends in a round, as numpy's doubles."""
    return Scripted().local(node(made.site, k, round))["delta"].flat.double().numpy()


def played(made, rounds, method):
    """The paper's server in numpy: (reputations, all reward sums by client) after some rounds of `made`'s cohorts."""
    sizes = made.site.task.sizes
    r, gone, total = {}, set(), {}
    for round in range(1, rounds + 1):
        cohort = made.world.choose(round)
        up = {k: upload(made, round, k) for k in cohort}
        weights = {k: r.get(k, 0.0) for k in cohort}
        if not method.reputation or not any(weights.values()):
            weights = {k: 0.0 if k in gone else float(sizes[k]) for k in cohort}
        whole = sum(weights.values())
        g = sum(weights[k] / whole * up[k] for k in cohort)
        assert np.linalg.norm(g) <= max(np.linalg.norm(u) for u in up.values()) * (1 + 1e-6)
        share = {k: weights[k] / whole for k in cohort}
        if method.reputation:
            for k in cohort:
                cosine = up[k] @ g / np.linalg.norm(up[k]) / np.linalg.norm(g)
                r[k] = 0.0 if k in gone else max(0.0, method.alpha * r.get(k, 0.0) + (1 - method.alpha) * cosine)
            r = {k: value / sum(r.values()) for k, value in r.items()}
            if round > method.grace:
                beta = method.threshold / (len(sizes) - len(gone))
                gone |= {k for k in cohort if r[k] < beta}
                r = {k: 0.0 if k in gone else value for k, value in r.items()}
                r = {k: value / sum(r.values()) for k, value in r.items()}
            share = {k: r[k] / max(r.values()) for k in cohort}
        for k in cohort:
            kept, offsets = np.zeros_like(g), made.site.initial.layout.offsets
            for start, stop in itertools.pairwise(offsets):
                count = math.ceil((share[k] if method.masking else 1.0) * (stop - start))
                largest_ones = start + np.argsort(-np.abs(g[start:stop]), kind="stable")[:count]
                kept[largest_ones] = g[largest_ones]
            total[k] = total.get(k, 0.0) + kept
    return r, sorted(gone), total


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alpha": 0.5},
        {"reputation": False},
        {"masking": False},
        {"grace": 2, "threshold": 0.5},
        {"grace": 1, "threshold": 0.9, "alpha": 0.5},
    ],
)
@pytest.mark.parametrize("cohort", [None, 3])
def test_rounds_by_hand(fields, cohort):
    method = Scripted(**fields)
    made = ran(method, Toy(sizes=(60, 40, 30, 20, 9)), rounds=5, cohort=cohort, seed=2)
    r, gone, rewards = played(made, 5, method)
    assert made.server.removed == gone
    assert made.server.reputation == pytest.approx(r)
    for k, reward in rewards.items():
        moved = made.engine.states[k]["model"] - made.site.initial
        assert np.allclose(moved.flat.numpy(), reward, rtol=0, atol=1e-6)


def test_what_is_summed_is_no_longer_than_the_longest_upload():
    @dataclass(frozen=True)
    class Weighed(Rffl):
        @client
        def rewarded(self, client, reward):
            client.log(length=reward.values.norm())

    # Flipped signs once made the sum of the reputations heard nearly 0, and g fifteen times as long as any upload.
    task, method = Toy(sizes=(30,) * 10), Weighed(masking=False)
    made = ran(method, task, rounds=30, cohort=3, attack="sign_flip:0.3")
    lengths = [row["client/length"] for row in made.record.metrics]
    assert len(lengths) == 30 and 0 < max(lengths) <= method.clip * (1 + 1e-6)


def test_a_liar_is_removed_at_the_first_check_and_never_earlier():
    task = Toy(sizes=(30,) * 8)
    before, after, later = (ran(OneLies(), task, rounds=rounds) for rounds in (10, 11, 14))
    assert before.server.removed == [] and before.server.reputation[0] == 0
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
