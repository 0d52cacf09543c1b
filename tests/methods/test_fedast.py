"""FedAST: one task is FedBuff without discount, tasks are apart, jobs are conserved, variance decides who gets them."""

import pytest
import torch
from problems import ran

from fedloom.methods.asynchronous.fedast import FedAST, allot, variance
from fedloom.methods.asynchronous.fedbuff import FedBuff
from fedloom.tasks.several import Several, toy
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector

SPEED = {"speed": "lognormal:1.0"}  # no two clients end at one moment


def test_one_task_with_a_buffer_of_one_is_fedbuff_without_discount():
    task = Toy(sizes=(20, 30, 25, 35))
    one = ran(FedAST(buffer=1, epochs=1, dynamic=False), Several([task]), 9, **SPEED)
    buff = ran(FedBuff(buffer=1, decay=0.0), task, 9, **SPEED)
    assert one.server.rho == 4 and one.server.parts[0]["target"] == 4
    assert torch.equal(one.server.model.flat, buff.server.model.flat)


def test_alike_clients_are_synchronous():
    task = Toy(sizes=(32,) * 4)
    one = ran(FedAST(buffer=4, epochs=1, dynamic=False, server_lr=0.5), Several([task]), 3)
    buff = ran(FedBuff(buffer=0, server_lr=0.5), task, 3)
    assert torch.allclose(one.server.model.flat, buff.server.model.flat, rtol=0, atol=1e-6)


def test_a_task_moves_no_other():
    made = ran(FedAST(buffer=1, dynamic=False), toy(), 1, **SPEED)
    versions = [part["version"] for part in made.server.parts]
    assert sorted(versions) == [0, 1]
    still = versions.index(0)
    start = made.site.initial if still == 0 else made.site.network("part:1")
    assert torch.equal(made.server.parts[still]["model"].flat, start.flat)
    assert not torch.equal(made.server.parts[1 - still]["model"].flat, made.site.network("part:1").flat)


def test_both_tasks_are_learned_and_judged():
    made = ran(FedAST(), toy(), 24, **SPEED)
    row = made.record.final
    assert (
        row["server/part_0_accuracy"] == pytest.approx(row["global_test_accuracy"])
        and row["global_test_accuracy"] > 0.8
    )
    assert row["server/part_1_accuracy"] > 0.8


@pytest.mark.parametrize("lost", [0.0, 0.3])
def test_jobs_are_conserved_and_every_difference_is_used_once(lost):
    task = toy(sizes=(10, 20, 15, 30, 12, 18, 25, 22))
    made = ran(FedAST(buffer=2), task, 40, lost=lost, **SPEED)
    parts, pending = made.server.parts, made.boundary.pending
    targets = [part["target"] for part in parts]
    assert sum(targets) == 8 and all(t >= made.server.rho == 2 and t % 2 == 0 for t in targets)
    assert set(made.server.jobs) == pending.busy
    came = sum(row["replies"] for row in made.record.metrics)
    moved = [len(part["buffer"]) for part in parts]
    assert came >= sum(part["version"] for part in parts) + sum(moved)
    assert all(part["version"] > 8 for part in parts)


def test_the_allocation_follows_the_scores_in_multiples():
    parts = [{}, {}, {}]
    allot(parts, [1.0, 1.0, 6.0], 48, 4)
    assert [part["target"] for part in parts] == [8, 4, 36], "of 12 units 1.5, 1.5 and 9 are due"
    allot(parts, [0.0, 0.0, 1.0], 48, 4)
    assert [part["target"] for part in parts] == [4, 4, 40]
    allot(parts, [0.0, 0.0, 0.0], 48, 4)
    assert sum(part["target"] for part in parts) == 48


@pytest.mark.parametrize(
    ("scores", "total", "rho", "due"),
    [
        ([1, 9], 40, 4, [4, 36]),
        ([1, 5], 192, 32, [32, 160]),
        ([1, 99], 40, 4, [4, 36]),
        ([1, 1, 1, 97], 40, 4, [4, 4, 4, 28]),
        ([4, 1, 5], 100, 10, [40, 10, 50]),
    ],
)
def test_the_allocation_is_proportional_but_for_the_least(scores, total, rho, due):
    parts = [{} for _ in scores]
    allot(parts, scores, total, rho)
    assert [part["target"] for part in parts] == due


def test_the_score_is_the_relative_variance():
    layout = Layout(("w",), ((2,),), 1)
    deltas = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]), torch.tensor([2.0, 3.0])]
    recent = [{"delta": Vector(d, layout), "steps": 5} for d in deltas]
    # Mean (2, 1): squared distances 2, 2, 4; its square 5.
    assert variance(recent, 0.1) == pytest.approx((8 / 3) / 5 / 0.5**2)


def test_the_scores_are_the_variances_to_the_power(monkeypatch):
    from fedloom.methods.asynchronous import fedast

    seen, honest = [], fedast.allot
    monkeypatch.setattr(fedast, "variance", lambda recent, lr: 4.0 if len(seen) % 2 else 9.0)
    monkeypatch.setattr(
        fedast, "allot", lambda parts, scores, *a: (seen.append(list(scores)), honest(parts, scores, *a))
    )
    for power, score in ((1.0, 4.0), (0.5, 2.0)):
        seen.clear()
        ran(FedAST(power=power, buffer=1), toy(), 60)
        assert seen[0] == [1.0, 1.0] and seen[1] == [score, score], "as many jobs to each at first"


def test_a_steps_statistics_go_by_the_share_of_its_buffer_among_the_tasks_jobs():
    layout = Layout(("w", "running"), ((2,), (2,)), 1)
    one = Vector(torch.tensor([1.0, 2.0, 4.0, 8.0]), layout)
    sent = [
        {"delta": torch.tensor([d, 0.0]), "statistics": torch.tensor([s, 0.0]), "steps": 1}
        for d, s in ((1.0, 2.0), (3.0, 6.0))
    ]
    buffer = [
        up
        | {"delta": Vector(up["delta"], one.params.layout), "statistics": Vector(up["statistics"], one.buffers.layout)}
        for up in sent
    ]
    part = {"model": one, "version": 0, "buffer": buffer, "recent": [], "target": 8}
    FedAST(server_lr=0.5).step(part)
    assert part["model"].flat.tolist() == pytest.approx([1 + 0.5 * 2, 2.0, 0.75 * 4 + 0.25 * 4, 0.75 * 8])
    assert part["buffer"] == [] and part["version"] == 1
