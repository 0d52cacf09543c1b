"""OCFL: the temperature, the one moment at which it clusters, and what clusters learn afterwards."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import Quadratics, ran
from sklearn.cluster import MeanShift
from sklearn.metrics.pairwise import cosine_distances

from fedloom.method import Method, client
from fedloom.methods.cluster.ocfl import Ocfl, distances, joined, temperature
from fedloom.ops.agreement import adjusted_rand
from fedloom.tasks.toy import Toy


class Camps(Quadratics):
    """Six clients in two camps, by turns, whose centers lie apart; client 5 has most samples."""

    centers = torch.tensor([[4.0, 1.0], [-3.0, -2.0]] * 3, dtype=torch.float64)
    centers = centers + 0.3 * torch.arange(12, dtype=torch.float64).view(6, 2).sin()
    curvatures = torch.tensor([[1.0, 0.2], [0.2, 0.5]], dtype=torch.float64).repeat(6, 1, 1)

    def __init__(self, moved=()):
        super().__init__(sizes=(3, 3, 3, 3, 3, 9))
        for k in moved:
            self.x[self.spans[k] : self.spans[k + 1]] += 1.0

    def info(self, client):
        return {**super().info(client), "group": "ab"[client % 2]}


CAMPS = {k: k % 2 for k in range(6)}
FIELDS = {"lr": 0.1, "epochs": 2, "batch": 0}


def played(task, rounds, lr=0.1, steps=2, server_lr=1.0, clients=range(6), tolerance=0.0):
    """The algorithm in numpy: models by camp, the temperatures, and the round in which it clusters (0: never)."""
    shrink = [task.shrinkage(k, lr, steps).numpy() for k in clients]
    centers = [task.data(k, "train").x.mean(0).numpy() for k in clients]
    models, heats, fired = {0: np.zeros(2), 1: np.zeros(2)}, [], 0
    for round in range(1, rounds + 1):
        deltas = {k: shrink[k] @ (centers[k] - models[k % 2]) for k in clients}
        if not fired:
            D = cosine_distances(np.stack([deltas[k] for k in clients]))
            heats.append(np.sqrt((D**2).sum() / (4 * 6 * 5)))
            if len(heats) > 1 and heats[-1] > heats[-2] * (1 + tolerance):
                fired = round
        for camp in (0, 1):
            some = [deltas[k] for k in clients if not fired or k % 2 == camp]
            models[camp] = models[camp] + server_lr * np.mean(some, axis=0)
    return models, heats, fired


@pytest.mark.parametrize(("rounds", "server_lr"), [(8, 1.0), (8, 0.5)])
def test_the_box_in_numpy(rounds, server_lr):
    task = Camps()
    models, heats, fired = played(task, rounds, server_lr=server_lr)
    assert 1 < fired < rounds - 1, "the problem lets it cluster in the middle"
    made = ran(Ocfl(**FIELDS, server_lr=server_lr), task, rounds=rounds)
    rows = made.record.metrics
    told = [row["server/temperature"] for row in rows if "server/temperature" in row]
    assert told == pytest.approx(heats, rel=1e-6) and len(told) == fired, "once it has clustered it asks no more"
    assert adjusted_rand([made.server.clusters[k] for k in range(6)], [*CAMPS.values()]) == 1.0
    for k in range(6):
        assert np.allclose(made.server.models[made.server.clusters[k]].flat.numpy(), models[k % 2], atol=1e-8)
    scored = [row.get("cluster_ari") for row in rows]
    assert scored == [None] * (fired - 1) + [1.0] * (rounds - fired + 1)


def test_a_tolerance_defers_it():
    task = Camps()
    for tolerance in (0.0, 0.3, 1e9):
        _, heats, fired = played(task, 8, tolerance=tolerance)
        made = ran(Ocfl(**FIELDS, tolerance=tolerance), task, rounds=8)
        assert bool(made.server.clusters) == bool(fired)
        assert sum("server/temperature" in row for row in made.record.metrics) == len(heats)


@dataclass(frozen=True)
class Plain(Method):
    """FedAvg whose mean is not weighted."""

    epochs: int = 3
    global_model = False

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=0.05, epochs=self.epochs, batch=32)
        return {"delta": w - model}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("settings", [{}, {"cohort": 3, "lost": 0.2}], ids=str)
def test_before_it_clusters_it_is_fedavg_with_plain_weights(norm, settings):
    task = Toy(sizes=(40, 20, 30, 50), norm=norm)
    one = ran(Ocfl(tolerance=1e9), task, rounds=4, **settings)
    other = ran(Plain(), task, rounds=4, **settings)
    assert torch.equal(one.server.models[0].flat, other.server.model.flat) and len(one.server.models) == 1


def test_it_never_clusters_in_the_first_round():
    for seed in range(3):
        made = ran(Ocfl(), Toy(sizes=(20,) * 6), rounds=1, seed=seed)
        assert not made.server.clusters and made.server.start is None


def test_the_temperature_of_directions():
    same, turned = torch.ones(4, 3, dtype=torch.float64), torch.tensor([[1.0, 0.0], [-5.0, 0.0]], dtype=torch.float64)
    assert temperature(distances(same)) == pytest.approx(0, abs=1e-7)
    assert temperature(distances(turned)) == pytest.approx(1)
    rows = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    D = distances(rows)
    assert np.allclose(D.numpy(), cosine_distances(rows.numpy()), atol=1e-12) and not D.diagonal().any()
    assert torch.allclose(distances(rows * torch.tensor([1.0, 3.0, 0.1, 9.0, 2.0])[:, None]), D, atol=1e-12)
    assert distances(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[0, 1], [1, 0]]


def test_what_a_cluster_learns_does_not_depend_on_the_others():
    task, moved = Camps(), Camps()
    fired = played(task, 8)[2]
    one, other = (ran(Ocfl(**FIELDS), task, rounds=8) for _ in range(2))
    assert torch.equal(one.server.models[0].flat, other.server.models[0].flat)

    class Later(Camps):
        """Camp b changes its mind once all are clustered."""

        def at(self, round):
            return self if round <= fired else Camps(moved=(1, 3, 5))

    turned = ran(Ocfl(**FIELDS), Later(), rounds=8)
    a, b = one.server.clusters[0], one.server.clusters[1]
    assert turned.server.clusters == one.server.clusters
    assert torch.equal(turned.server.models[a].flat, one.server.models[a].flat)
    assert not torch.equal(turned.server.models[b].flat, one.server.models[b].flat)
    assert moved.x is not task.x


@pytest.mark.parametrize("clustering", ["hdbscan", "meanshift", "kmeans", "affinity"])
def test_every_clustering_finds_three_groups_of_five(clustering):
    draw = torch.Generator().manual_seed(3)
    rows = torch.eye(3, dtype=torch.float64)[torch.arange(15) % 3] + 0.02 * torch.randn(15, 3, generator=draw)
    labels = Ocfl(clustering=clustering).labels(distances(rows), draw).tolist()
    assert set(labels) == set(range(1 + max(labels)))
    if clustering == "meanshift":  # its width comes of the distances, and it may split a group
        assert adjusted_rand(labels, MeanShift().fit_predict(cosine_distances(rows)).tolist()) == 1.0
    assert adjusted_rand(labels, [k % 3 for k in range(15)]) > (0.8 if clustering == "meanshift" else 0.999)


@pytest.mark.parametrize("clustering", ["hdbscan", "kmeans", "affinity"])
def test_clusters_learn_what_their_camps_want(clustering):
    made = ran(Ocfl(**FIELDS, clustering=clustering, clusters=2), Camps(), rounds=8)
    assert made.record.metrics[-1]["cluster_ari"] == 1.0
    for k in range(6):
        own = made.server.models[made.server.clusters[k]].flat
        assert (own - Camps.centers[k]).norm() < (own - Camps.centers[1 - k % 2]).norm()


def test_noise_joins_the_nearest_cluster_by_mean_distance():
    D = torch.tensor(
        [
            [0.0, 0.1, 1.0, 1.0, 0.6],
            [0.1, 0.0, 1.0, 1.0, 0.6],
            [1.0, 1.0, 0.0, 0.2, 0.1],
            [1.0, 1.0, 0.2, 0.0, 1.4],
            [0.6, 0.6, 0.1, 1.4, 0.0],
        ]
    )
    # The last is nearest to client 2, and on the mean to clients 0 and 1: 0.6 against 0.75.
    assert joined(torch.tensor([4, 4, 7, 7, -1]), D).tolist() == [0, 0, 1, 1, 0]
    assert joined(torch.tensor([-1, -1, -1, -1, -1]), D).tolist() == [0] * 5


def test_who_comes_later_joins_the_nearest_cluster_and_trains_with_it():
    @dataclass(frozen=True)
    class Noting(Ocfl):
        @client
        def local(self, client, model):
            client.state["seen"] = [*client.state.get("seen", []), model.flat.tolist()]
            return Ocfl.local(self, client, model)

    made = ran(Noting(**FIELDS), Camps(), rounds=14, cohort=4)
    rows = made.record.metrics
    fired = next(row["round"] for row in rows if "cluster_ari" in row)
    train = [line for line in made.record.ledger if line["kind"] == "train" and line["round"] > fired]
    late = [line for line in train if line["verb"] == "call"]
    assert late, "somebody was not there"
    strangers = {k for line in late for k in line["clients"]}
    assert all(sum(k in line["clients"] for line in late if line["field"] == "model") == 1 for k in strangers)
    assert all(made.server.start.flat.tolist() in made.engine.states[k]["seen"] for k in strangers)
    if len(set(made.server.clusters.values())) == 2:
        assert adjusted_rand([made.server.clusters[k] for k in range(6)], [*CAMPS.values()]) == 1.0
    lost = ran(Ocfl(**FIELDS), Camps(), rounds=20, cohort=4, lost=0.3)
    assert lost.record.metrics[-1]["cluster_ari"] == 1.0


def test_each_client_is_judged_by_the_model_of_its_cluster():
    made = ran(Ocfl(**FIELDS), Camps(), rounds=8)
    sent = made.method.predict_message(made.server, made.everybody)["model"]
    assert all(sent[k] is made.server.models[c] for k, c in made.server.clusters.items())
    before = ran(Ocfl(**FIELDS), Camps(), rounds=1)
    first = before.method.predict_message(before.server, before.everybody)["model"]
    assert all(first[k] is before.server.models[0] for k in range(6))
    assert made.record.final["global_test_accuracy"] is None
    assert math.isfinite(made.record.metrics[0]["server/temperature"])


def test_a_rise_is_over_the_round_before(monkeypatch):
    for tolerance, told in ((0.0, [False, False, True, True]), (0.1, [False, False, False, True])):
        heats = iter([0.5, 0.3, 0.32, 0.36])
        monkeypatch.setattr("fedloom.methods.cluster.ocfl.temperature", lambda apart, heats=heats: next(heats))
        made = ran(Ocfl(**FIELDS, tolerance=tolerance), Camps(), rounds=4)
        assert ["cluster_ari" in row for row in made.record.metrics] == told, (
            "by a share of it: 0.36 is over 1.1 * 0.32"
        )
