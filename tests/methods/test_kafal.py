"""KAFAL: what is asked for, the balanced and compensated loss, cycles and their budgets."""

import math

import numpy as np
import pytest
import torch
from problems import close, network, node, ran
from torch.nn import functional as F

import fedloom
from fedloom import tasks
from fedloom.calls import ASKED
from fedloom.errors import UsageError
from fedloom.methods.labels.kafal import KAFAL, compensated, discrepancy
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Client
from fedloom.random import stream
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.task import Batch
from fedloom.tasks.oracle import toy
from fedloom.testing import check_method
from fedloom.testing.contract import (
    check_client_order,
    check_learns,
    check_loopback,
    check_lost_clients,
    check_lost_is_unasked,
    check_payload_bytes,
    check_pool,
    check_resume,
    check_vectorized,
)
from fedloom.vector import Vector

TOY = toy()
WIDE = toy(sizes=(60, 41, 55))
RIVAL = {"sampling": "random", "update": "plain"}


def site(task=TOY):
    return Site(task, 0, needs=("oracle",))


def client(task=TOY, id=0, **state):
    return Client(site(task), id, state, "train", 1)


def shaken(w, seed=1, by=0.5):
    return Vector(w.flat + by * torch.randn(len(w.flat), generator=stream(seed, "shaken")), w.layout)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(scores):
    e = np.exp(np.asarray(scores) - max(scores))
    return e / e.sum()


# What is asked for


def test_the_divergence_by_hand():
    one, other = (torch.randn(5, 4, generator=stream(k, "scores"), dtype=torch.float64) for k in (1, 2))
    counts = torch.tensor([3.0, 0.0, 10.0, 1.0], dtype=torch.float64)
    found = discrepancy(one, other, counts)
    for row in range(5):
        here = [0, 2, 3]
        p, q = (softmax([float(s[row, c]) + math.log(float(counts[c])) for c in here]) for s in (one, other))
        assert float(found[row]) == pytest.approx(0.5 * (kl(p, q) + kl(q, p)), rel=1e-9)


def test_the_divergence_is_symmetric_and_none_between_equals():
    one, other = (torch.randn(50, 4, generator=stream(k, "scores")) for k in (1, 2))
    for counts in (torch.tensor([3.0, 0.0, 10.0, 1.0]), torch.ones(4)):
        assert torch.allclose(discrepancy(one, other, counts), discrepancy(other, one, counts))
        assert (discrepancy(one, other, counts) >= 0).all() and (discrepancy(one, one, counts) == 0).all()


def test_equal_counts_are_the_plain_divergence():
    one, other = (torch.randn(9, 4, generator=stream(k, "scores"), dtype=torch.float64) for k in (1, 2))
    p, q = one.softmax(1), other.softmax(1)
    plain = 0.5 * ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1))
    for count in (1.0, 37.0):
        assert torch.allclose(discrepancy(one, other, torch.full((4,), count, dtype=torch.float64)), plain)


def test_a_class_without_a_label_counts_for_nothing():
    one, other = (torch.randn(9, 4, generator=stream(k, "scores")) for k in (1, 2))
    counts = torch.tensor([3.0, 0.0, 10.0, 1.0])
    before = discrepancy(one, other, counts)
    one[:, 1] += 100.0
    assert torch.equal(discrepancy(one, other, counts), before) and before.isfinite().all()
    limit = discrepancy(one - torch.tensor([0, 100.0, 0, 0]), other, torch.tensor([3.0, 1e-9, 10.0, 1.0]))
    assert torch.allclose(limit, before, atol=1e-4)


def most(scores, few):
    return set(scores.argsort(descending=True)[:few].tolist())


@pytest.mark.parametrize("sampling", ["ksas", "entropy"])
def test_those_are_asked_for_of_whom_most_is_to_be_learned(sampling):
    start = site(WIDE).initial
    own, model = shaken(start, 1), shaken(start, 2)
    me = client(WIDE, 0, model=own)
    pool, counts = me.pool, torch.bincount(me.data.y, minlength=3).double()
    with torch.no_grad():
        a, b = (network(WIDE, w).double()(pool.x.double()) for w in (own, model))
    p = b.softmax(1)
    scores = -(p * p.log()).sum(1) if sampling == "entropy" else discrepancy(a, b, counts)
    KAFAL(share=0.1, sampling=sampling).sample(me, model, 1)
    assert set(me.state[ASKED].tolist()) == set(pool.rows[list(most(scores, 6))].tolist()), "6 of 60"


def test_random_asks_for_any_and_others_each_round():
    asked = []
    for round in (1, 2):
        me = Client(site(WIDE), 0, {}, "train", round)
        KAFAL(share=0.1, sampling="random").sample(me, me.initial, 1)
        asked.append(set(me.state[ASKED].tolist()))
    assert len(asked[0]) == len(asked[1]) == 6 and asked[0] != asked[1]


def test_where_nobody_differs_it_is_a_draw():
    """Client and server have one model: all scores are 0, and the first of the pool are no better than others."""
    asked = []
    for round in (1, 2):
        me = Client(site(WIDE), 0, {}, "train", round)
        first = me.pool.rows[:6].tolist()
        KAFAL(share=0.1).sample(me, me.initial, 1)
        asked.append(me.state[ASKED].tolist())
        assert sorted(asked[-1]) != first
    assert set(asked[0]) != set(asked[1])


def test_its_last_model_is_the_one_before_the_average():
    made = ran(KAFAL(cycle=1, share=0.1), WIDE, rounds=2)
    first = ran(KAFAL(cycle=1, share=0.1), WIDE, rounds=1)
    for k in range(3):
        own = first.engine.states[k]["model"]
        assert not torch.equal(own.flat, first.server.model.flat)
        me = Client(site(WIDE), k, {"model": own}, "train", 2)
        pool, few = me.pool, math.ceil(0.1 * WIDE.sizes[k])
        with torch.no_grad():
            scores = discrepancy(
                me.scores(own, pool.x), me.scores(first.server.model, pool.x), torch.bincount(me.data.y, minlength=3)
            )
        expected = most(scores, min(few, WIDE.allowance(k)))
        assert set(made.engine.states[k][ASKED].tolist()) == set(pool.rows[list(expected)].tolist())


# Cycles and budgets


def test_every_cycle_asks_for_its_share_until_the_budget_is_spent():
    made = ran(KAFAL(cycle=2, share=0.07), WIDE, rounds=9)
    each = [math.ceil(0.07 * n) for n in WIDE.sizes]
    expected, had = [], [0, 0, 0]
    for round in range(1, 10):
        new = [0, 0, 0]
        if round > 1 and round % 2 == 1:
            new = [min(b, WIDE.allowance(k) - had[k]) for k, b in enumerate(each)]
            had = [a + b for a, b in zip(had, new, strict=True)]
        expected.append(sum(new))
    assert [row["labels"] for row in made.record.metrics] == expected and expected[2] == sum(each)
    for k in range(3):
        rows = made.engine.states[k][ASKED].tolist()
        assert len(rows) == len({*rows}) == had[k] and set(rows) <= set(WIDE.pool(k).rows.tolist())


def test_without_a_budget_it_ends_with_the_pool():
    task = tasks.build(Spec(clients=3, problem="oracle:0.5", partition="iid", model="mlp:4"))
    made = ran(KAFAL(cycle=1, share=0.2, batch=0), task, rounds=5)
    rows = [row["labels"] for row in made.record.metrics]
    assert sum(rows) == sum(len(task.pool(k)) for k in range(3)) and rows[0] == 0 and rows[1] == rows[2] > rows[3] > 0
    assert rows[4] == 0


def test_who_was_silent_catches_up():
    made = ran(KAFAL(cycle=1, share=0.05), WIDE, rounds=8, dropout=0.4)
    cycles = len(made.record.metrics) - 1
    assert sum(row["labels"] for row in made.record.metrics) <= WIDE.budget
    assert all(len(made.engine.states[k][ASKED]) <= cycles * math.ceil(0.05 * n) for k, n in enumerate(WIDE.sizes))
    me = client(WIDE, 0)
    KAFAL(share=0.05).sample(me, me.initial, 2)
    assert me.asked == 6, "two cycles' worth"
    KAFAL(share=0.05).sample(me, me.initial, 2)
    assert me.asked == 6, "asked again, it has them"


def test_a_cycle_of_which_nobody_was_heard_is_not_paid_twice():
    made = ran(KAFAL(cycle=1, share=0.05), WIDE, rounds=2, lost=1.0)
    assert sum(row["labels"] for row in made.record.metrics) == 3 + 3 + 3, "ceil(0.05 n) of each"
    again = ran(KAFAL(cycle=1, share=0.05), WIDE, rounds=4, lost=0.8)
    assert sum(row["labels"] for row in again.record.metrics) <= 3 * 9


def test_a_cycle_begins_with_the_first_model_again():
    made = ran(KAFAL(cycle=2, **RIVAL, share=0.0, batch=0), TOY, rounds=3)
    once = ran(KAFAL(cycle=2, **RIVAL, share=0.0, batch=0), TOY, rounds=1)
    assert torch.equal(made.server.model.flat, once.server.model.flat)
    warm = ran(KAFAL(cycle=2, **RIVAL, share=0.0, batch=0, restart=False), TOY, rounds=3)
    plain = ran(FedAvg(lr=0.1, batch=0), TOY, rounds=3)
    assert torch.equal(warm.server.model.flat, plain.server.model.flat)


def test_everybody_takes_part_in_the_last_round_of_a_cycle():
    made = ran(KAFAL(cycle=3), TOY, rounds=6, cohort=2)
    assert [row["cohort"] for row in made.record.metrics] == [2, 2, 4, 2, 2, 4]


def test_a_round_undone_at_the_start_of_a_cycle_is_no_start():
    """Nobody is heard in round 3: round 4 begins the cycle, from the first model, without teacher and more labels."""
    seen, plain = [], KAFAL.local

    def local(self, client, model, teaches):
        seen.append((client.round, torch.equal(model.flat, client.initial.flat), teaches))
        return plain(self, client, model, teaches)

    local.__client__ = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KAFAL, "local", local)
        for seed in range(20):
            made = ran(KAFAL(cycle=2, share=0.05), WIDE, rounds=4, cohort=1, lost=0.4, seed=seed)
            if [row["replies"] > 0 for row in made.record.metrics] == [True, True, False, True]:
                break
            seen.clear()
        else:
            raise AssertionError("there is no such world among these")
    begun = {round: (first, teaches) for round, first, teaches in seen}
    assert begun == {1: (True, False), 2: (False, True), 3: (True, False), 4: (True, False)}
    assert [row["labels"] for row in made.record.metrics] == [0, 0, 9, 0] and made.server.cycle == 2


# The update


def test_it_is_fedavg_until_the_first_labels_come():
    made, plain = ran(KAFAL(lr=0.05, cycle=9, **RIVAL), TOY, rounds=3), ran(FedAvg(lr=0.05), TOY, rounds=3)
    assert torch.equal(made.server.model.flat, plain.server.model.flat)


def test_what_was_asked_for_is_trained_on_and_counts():
    made = ran(KAFAL(cycle=1, share=0.1, **RIVAL, batch=0, restart=False, lr=0.2), WIDE, rounds=2)
    first = ran(KAFAL(cycle=1, share=0.1, **RIVAL, batch=0, restart=False, lr=0.2), WIDE, rounds=1)
    moved, total = 0, 0
    for k in range(3):
        rows = made.engine.states[k][ASKED]
        few, pool = WIDE.data(k, "train"), WIDE.pool(k)
        x, y = torch.cat([few.x, pool.inputs[rows]]), torch.cat([few.y, pool.labels[rows]])
        net = network(WIDE, first.server.model)
        slope = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        moved = moved - 0.2 * len(y) * torch.cat([g.flatten() for g in slope])
        total += len(y)
    torch.testing.assert_close(
        (made.server.model - first.server.model).params.flat, moved / total, rtol=1e-4, atol=1e-6
    )


def test_equal_counts_leave_the_plain_cross_entropy():
    net, batch = network(TOY, site().initial), TOY.data(0, "train").all()
    plain = TOY.loss(net, batch)
    for count in (1.0, 20.0):
        prior = torch.full((3,), count).log()
        torch.testing.assert_close(compensated(net, batch, TOY, prior, None), plain, rtol=1e-5, atol=1e-6)


def test_a_class_without_a_label_is_not_pushed_down():
    net, batch = network(TOY, site().initial), TOY.data(0, "train").all()  # client 0 has no sample of class 0
    prior = torch.bincount(batch.y, minlength=3).float().log()
    loss = compensated(net, batch, TOY, prior, None)
    (slope,) = torch.autograd.grad(loss, net.head.weight)
    assert (slope[0] == 0).all() and slope[1].abs().sum() > 0 and loss.isfinite()


def test_the_loss_by_hand():
    net, batch = network(TOY, site().initial).double(), TOY.data(1, "train").all()
    batch = Batch(batch.x.double(), batch.y)
    counts = torch.tensor([4.0, 0.0, 9.0], dtype=torch.float64)
    draw = stream(3, "loss")
    v = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    said = torch.randn(6, 3, generator=draw, dtype=torch.float64).softmax(1)
    weight = torch.rand(6, generator=draw, dtype=torch.float64)
    found = compensated(net, batch, TOY, counts.log(), (v, said, weight)).item()
    with torch.no_grad():
        scores, student = net(batch.x), net(v)
    value = 0.0
    for row, label in zip(scores.tolist(), batch.y.tolist(), strict=True):
        p = softmax([row[0] + math.log(4), row[2] + math.log(9)])
        value -= math.log(p[{0: 0, 2: 1}[label]]) / len(batch)
    for i in range(6):
        value += float(weight[i]) * kl(said[i].tolist(), softmax(student[i].tolist())) / 3 / 6
    assert found == pytest.approx(value, rel=1e-9)


def test_the_mixtures_and_what_they_weigh():
    me, method = client(WIDE, 1), KAFAL()
    model = ran(FedAvg(lr=0.1), WIDE, rounds=4).server.model
    u, counts = me.pool.x[:12], torch.tensor([2.0, 0.0, 6.0])
    v, said, weight = method.hints(me, model, u, counts, stream(0, "mix"))
    draw = stream(0, "mix")
    b, partner = torch.rand(3, 12, generator=draw).sort(0).values[1], torch.randperm(12, generator=draw)
    assert len({*partner.tolist()}) == 12
    torch.testing.assert_close(v, b[:, None] * u + (1 - b[:, None]) * u[partner])
    with torch.no_grad():
        torch.testing.assert_close(said, network(WIDE, model)(v).softmax(1))
    omega = torch.tensor([6 / 8, 0.0, 2 / 8])  # 1/2 and 1/6, to a sum of 1
    g = said.argmax(1)
    assert len({*g.tolist()}) > 1
    torch.testing.assert_close(weight, b * omega[g] + (1 - b) * omega[g[partner]])


def test_shares_of_mixtures_are_beta_2_2():
    me, method = client(), KAFAL()
    u = torch.stack([torch.zeros(6), torch.ones(6)]).repeat(2000, 1)
    v, _, _ = method.hints(me, me.initial, u, torch.ones(3), stream(1, "mix"))
    mixed = v[(v[:, 0] > 0) & (v[:, 0] < 1), 0].double()
    assert len(mixed) > 1500
    assert float(mixed.mean()) == pytest.approx(0.5, abs=0.02) and float(mixed.var()) == pytest.approx(0.05, abs=0.004)


def test_the_teacher_is_the_model_received_from_the_second_round_of_a_cycle_on():
    taught = []
    plain = KAFAL.hints

    def hints(self, client, model, u, counts, draw):
        taught.append((client.round, model.flat.clone()))
        pool = client.pool.x
        assert all((row == pool).all(1).any() for row in u), "it is told what it has no label of"
        return plain(self, client, model, u, counts, draw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KAFAL, "hints", hints)
        made = ran(KAFAL(cycle=2, batch=5, epochs=2), TOY, rounds=4)
        rounds = {round for round, _ in taught}
        assert rounds == {2, 4}, "not in the first of a cycle, whose model knows nothing"
        steps = sum(-(-len(TOY.data(k, "train")) // 5) * 2 for k in range(4))
        assert sum(round == 2 for round, _ in taught) == steps, "with every step"
        del taught[:]
        once = ran(KAFAL(cycle=2, batch=5, epochs=2), TOY, rounds=1)
        twice = ran(KAFAL(cycle=2, batch=5, epochs=2), TOY, rounds=2)
    assert all(torch.equal(model, once.server.model.flat) for _, model in taught)
    assert made.record.final["round"] == 4 and not torch.equal(once.server.model.flat, twice.server.model.flat)


def test_an_empty_pool_teaches_nothing():
    task = tasks.build(Spec(clients=3, problem="oracle:1.0", partition="iid", model="mlp:4"))
    made = ran(KAFAL(cycle=2, batch=0), task, rounds=4)
    assert [row["labels"] for row in made.record.metrics] == [0, 0, 0, 0]


def test_compensation_keeps_what_a_client_has_no_label_of():
    """After long local training, the class that a client lacks is still known to its model."""
    known = {}
    for update in ("kcfu", "plain"):
        made = ran(KAFAL(cycle=12, update=update, lr=0.5, epochs=40), TOY, rounds=2)
        public, right = TOY.public(), []
        for k in range(3):
            scores = node(made.site, k).scores(made.engine.states[k]["model"], public.x[public.y == k])
            right.append(float((scores.argmax(1) == k).double().mean()))
        known[update] = sum(right) / 3
    assert known["kcfu"] > known["plain"] + 0.08


def test_one_round_by_hand():
    """The first round: balanced cross-entropy, weighted by labels."""
    made = ran(KAFAL(batch=0, lr=0.2), TOY, rounds=1)
    states, total = [], sum(len(TOY.data(k, "train")) for k in range(4))
    for k in range(4):
        net, batch = network(TOY, made.site.initial), TOY.data(k, "train").all()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        prior = torch.bincount(batch.y, minlength=3).float().log()
        F.cross_entropy(net(batch.x) + prior, batch.y).backward()
        optimizer.step()
        states.append((len(batch), net.state_dict()))
    mean = {name: sum(n / total * state[name] for n, state in states) for name in states[0][1]}
    assert close(made.server.model, mean)


def test_texts_are_refused_unless_the_update_is_plain(tmp_path):
    words = ["good", "bad", "fine", "poor", "great", "awful", "nice", "sad", "late", "cold", "warm"]
    draw = torch.randint(11, (80, 6), generator=stream(0, "words")).tolist()
    lines = ["text,label", *(f"{' '.join(words[w] for w in row)},{i % 2}" for i, row in enumerate(draw))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    settings = {"data": str(tmp_path / "t.csv"), "problem": "oracle:0.5", "partition": "iid", "clients": 2, "rounds": 1}
    with pytest.raises(UsageError, match=r"kafal mixes inputs, which must be numbers, .* take method.update=plain"):
        fedloom.run("kafal", **settings)
    assert fedloom.run("kafal", fields={"update": "plain"}, **settings).metrics


@pytest.mark.parametrize(
    "check",
    [
        check_loopback,
        check_pool,
        check_resume,
        check_vectorized,
        check_client_order,
        check_lost_clients,
        check_lost_is_unasked,
        check_payload_bytes,
    ],
)
@pytest.mark.parametrize("sampling", ["ksas", "random"])
def test_the_contract_holds_where_every_round_asks(check, sampling):
    check_method(KAFAL(cycle=1, sampling=sampling), [check])


def test_it_learns_with_every_sampling():
    for sampling in ("ksas", "entropy", "random"):
        check_method(KAFAL(sampling=sampling), [check_learns])
