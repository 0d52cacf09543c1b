"""FCP: the threshold's rank, pooled scores, and coverage."""

import math
from itertools import pairwise

import pytest
import torch
from problems import network, node, ran

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.personalize.local import Local
from fedloom.methods.trust.fcp import FCP, aps, lac, threshold
from fedloom.random import stream
from fedloom.tasks.toy import Toy


def exact(scores, clients, alpha):
    return threshold(scores, torch.ones(len(scores)), len(scores), clients, alpha)


def test_one_client_is_split_conformal_prediction():
    scores = torch.rand(19, generator=stream(0, "test"))
    for alpha in (0.05, 0.1, 0.25, 0.5):
        assert exact(scores, 1, alpha) == pytest.approx(
            float(scores.sort().values[math.ceil(20 * (1 - alpha) - 1e-9) - 1])
        )
    assert exact(scores, 1, 0.04) == math.inf, "nineteen scores promise no more than 95 %"
    assert exact(torch.arange(9.0), 1, 0.1) == 8.0


@pytest.mark.parametrize("clients", [1, 4])
def test_coverage_is_what_is_promised_and_little_more(clients):
    # A test score is drawn from client k's distribution with weight (n_k + 1) / (N + K).
    draw, alpha, sizes = stream(1, "test"), 0.2, torch.tensor([10, 25, 7, 18])[:clients]
    n, hits, repeats = int(sizes.sum()), 0.0, 6000
    for _ in range(repeats):
        scores = torch.cat([k + torch.rand(int(size), generator=draw) * (1 + k) for k, size in enumerate(sizes)])
        k = int(torch.multinomial((sizes + 1).double(), 1, generator=draw))
        hits += float(k + torch.rand((), generator=draw) * (1 + k) <= exact(scores, clients, alpha))
    assert 1 - alpha - 0.015 < hits / repeats < 1 - alpha + clients / (n + clients) + 0.015


def test_scores_of_classes():
    p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]])
    torch.testing.assert_close(lac(p), 1 - p)
    torch.testing.assert_close(aps(p)[0], torch.tensor([0.5, 1.0, 0.8]))
    assert aps(p)[1, 1] == pytest.approx(0.8)


class Calibrated(Toy):
    """Toy with as many validation and test samples as one likes."""

    def data(self, client, split):
        whole = super().data(client, "train").rows
        third = len(whole) // 3
        return type(super().data(client, "train"))(
            self.x,
            self.y,
            {"train": whole[:third], "validation": whole[third : 2 * third], "test": whole[2 * third :]}[split],
        )


TASK = Calibrated(sizes=(300, 450, 240, 600))


@pytest.mark.parametrize("inner", [FedAvg(lr=0.01), Local(lr=0.01)])
@pytest.mark.parametrize("score", ["lac", "aps"])
def test_a_run_covers_its_test_samples(score, inner):
    final = {alpha: ran(FCP(inner, alpha=alpha, score=score), TASK, rounds=1).record.final for alpha in (0.05, 0.3)}
    for alpha, row in final.items():
        assert row["personal_test_coverage"] > 1 - alpha - 0.08
    assert final[0.05]["personal_test_coverage"] >= final[0.3]["personal_test_coverage"]
    assert final[0.05]["personal_test_set_size"] > final[0.3]["personal_test_set_size"], "sets are nested"


def test_pooled_scores_are_one_however_dealt_and_sketches_are_near():
    made = {
        pool: ran(FCP(FedAvg(lr=0.01), pool=pool, sketch=20), TASK, rounds=1) for pool in ("exact", "sketch", "mean")
    }
    q = {pool: one.server.threshold for pool, one in made.items()}
    scores = torch.cat(
        [
            made["exact"].method.calibrate(node(made["exact"].site, k), model=made["exact"].server.model)["scores"]
            for k in range(4)
        ]
    )
    assert q["exact"] == exact(scores, 4, 0.1)
    rank = lambda value: float((scores <= value).double().mean())  # noqa: E731 - a formula
    assert abs(rank(q["sketch"]) - rank(q["exact"])) <= 1 / 20 + 1e-9
    assert q["mean"] != q["exact"]


def test_the_sketchs_bytes_do_not_depend_on_samples_or_model():
    made = ran(FCP(sketch=10), TASK, rounds=1)
    lines = [line for line in made.record.ledger if line["kind"] == "finish" and line["direction"] == "up"]
    assert {line["bytes"] for line in lines if line["field"] == "scores"} == {made_bytes(10)}


def made_bytes(count):
    from fedloom import encoding

    return encoding.sizes({"scores": torch.zeros(count)})["scores"]


def test_too_few_scores_give_every_class():
    made = ran(FCP(alpha=0.01), Toy(), rounds=1)
    assert made.server.threshold == math.inf
    assert made.record.final["personal_test_coverage"] == 1 and made.record.final["personal_test_set_size"] == 3


def held_out(made, k):
    """1 - p_y of a client's validation samples, in order."""
    x, y = made.task.data(k, "validation").all()
    p = network(made.task, made.server.model).eval()(x).softmax(1).detach()
    return (1 - p[range(len(y)), y]).sort().values


def test_the_three_ways_to_pool_by_hand():
    alpha, size = 0.15, 7
    made = {
        pool: ran(FCP(FedAvg(lr=0.01), pool=pool, sketch=size, alpha=alpha), TASK, rounds=1)
        for pool in ("exact", "sketch", "mean")
    }
    scores = [held_out(made["exact"], k) for k in range(4)]
    n = sum(map(len, scores))
    every = torch.cat(scores).sort().values
    rank = math.ceil((n + 4) * (1 - alpha) - 1e-9)
    assert made["exact"].server.threshold == pytest.approx(float(every[rank - 1]), rel=1e-5)
    local = [one[math.ceil((len(one) + 1) * (1 - alpha) - 1e-9) - 1] for one in scores]
    assert made["mean"].server.threshold == pytest.approx(float(sum(local) / 4), rel=1e-5)
    # A score in a sketch stands for itself and for those of its client since the one before: none is taken for less.
    told = []
    for one in scores:
        places = [round(len(one) * place / size) for place in range(size + 1)]
        for before, end in pairwise(places):
            told += [float(one[end - 1])] * (end - before)
    assert made["sketch"].server.threshold == pytest.approx(sorted(told)[rank - 1], rel=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.35, 0.5])
def test_a_sketch_never_promises_less_than_all_scores(monkeypatch, alpha):
    draw = stream(2, "test")
    scores = [torch.rand(n, generator=draw).sort().values for n in (40, 73, 55)]
    method, told, counts = FCP(sketch=8), [], []
    for one in scores:
        monkeypatch.setattr(FCP, "judging", lambda self, client, split, one=one: (None, one))
        reply = method.calibrate(None)
        told.append(reply["scores"])
        counts.append(reply["counts"])
        assert len(reply["scores"]) == 8 and reply["counts"].sum() == len(one) == reply["n"]
    n = sum(map(len, scores))
    q = threshold(torch.cat(told), torch.cat(counts), n, 3, alpha)
    every = torch.cat(scores)
    assert exact(every, 3, alpha) <= q
    assert float((every <= q).double().mean()) <= 1 - alpha + 3 / n + 1 / 8


class WithoutValidation(Calibrated):
    """The last client has nothing held out."""

    def data(self, client, split):
        data = super().data(client, split)
        return type(data)(self.x, self.y, data.rows[:0]) if (client, split) == (3, "validation") else data


@pytest.mark.parametrize("pool", ["exact", "sketch", "mean"])
def test_who_has_nothing_held_out_is_not_counted(pool):
    made = ran(FCP(FedAvg(lr=0.01), pool=pool, alpha=0.2), WithoutValidation(sizes=(63, 63, 63, 63)), rounds=1)
    scores = [held_out(made, k) for k in range(3)]
    assert [len(one) for one in scores] == [21, 21, 21]
    local = [one[math.ceil(22 * 0.8 - 1e-9) - 1] for one in scores]
    # Of 63 scores the ceil(66 * 0.8) = 53rd; with a fourth client it would be the 54th.
    expected = float(sum(local) / 3) if pool == "mean" else float(torch.cat(scores).sort().values[52])
    assert made.server.threshold == pytest.approx(expected, rel=1e-5)
