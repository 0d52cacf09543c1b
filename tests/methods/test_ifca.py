"""IFCA: who chooses which model, and what is averaged over whom."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import node, ran
from test_ocfl import CAMPS, Camps

from fedloom.method import Method, client
from fedloom.methods.cluster.ifca import Ifca
from fedloom.tasks.toy import Toy
from fedloom.vector import Vector

STARTS = [[0.5, 0.0], [-0.5, 0.2], [9.0, 9.0]]


@dataclass(frozen=True)
class Begun(Ifca):
    """From models that are given."""

    k: int = 3

    def setup(self, server, clients):
        Ifca.setup(self, server, clients)
        rows = [torch.tensor(row, dtype=torch.float64) for row in STARTS[: self.k]]
        server.models = [Vector(row, server.layout) for row in rows]


def played(task, rounds, lr, steps, averaging):
    models = [np.array(row) for row in STARTS]
    chosen = {}
    for _ in range(rounds):
        deltas = [[] for _ in models]
        for k in range(6):
            H, c = task.curvatures[k].numpy(), task.centers[k].numpy()
            losses = [0.5 * (w - c) @ H @ (w - c) for w in models]
            j = chosen[k] = int(np.argmin(losses))
            shrink = lr * H if averaging == "gradients" else task.shrinkage(k, lr, steps).numpy()
            deltas[j].append(shrink @ (c - models[j]))
        m = 6 if averaging == "gradients" else None
        models = [w + sum(d) / (m or len(d)) if d else w for w, d in zip(models, deltas, strict=True)]
    return models, chosen


@pytest.mark.parametrize("averaging", ["models", "gradients"])
def test_the_box_in_numpy(averaging):
    task = Camps()
    made = ran(Begun(lr=0.1, epochs=2, batch=0, averaging=averaging), task, rounds=4)
    models, chosen = played(task, 4, 0.1, 2, averaging)
    assert made.server.clusters == chosen == CAMPS
    for w, expected in zip(made.server.models, models, strict=True):
        assert np.allclose(w.flat.numpy(), expected, atol=1e-10)
    assert made.server.models[2].flat.tolist() == STARTS[2], "what nobody chose stays bitwise as it was"
    assert made.record.metrics[-1]["cluster_ari"] == 1.0


@dataclass(frozen=True)
class Plain(Method):
    """FedAvg whose mean is not weighted, asked in the second call of its round."""

    gradients: bool = False
    global_model = False

    def round(self, server, cohort):
        cohort.call(self.nothing)
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def nothing(self, client):
        pass

    @client
    def local(self, client, model):
        if self.gradients:
            return {"delta": -0.05 * client.grad(model, next(client.batches(10)))}
        w, _ = client.descend(model, lr=0.05, epochs=1, batch=10)
        return {"delta": w - model}


@pytest.mark.parametrize("gradients", [False, True])
def test_with_one_model_it_is_fedavg_or_fedsgd(gradients):
    task = Toy(sizes=(40, 20, 30, 50))
    one = ran(Ifca(k=1, averaging="gradients" if gradients else "models"), task, rounds=3)
    other = ran(Plain(gradients=gradients), task, rounds=3)
    assert torch.equal(one.server.models[0].flat, other.server.model.flat)


def test_the_models_begin_apart_and_alike_in_every_run():
    one, two, other = (ran(Ifca(k=3), Toy(), rounds=1, seed=seed).server for seed in (0, 0, 1))
    starts = [ran(Ifca(k=3, lr=1e-30), Toy(), rounds=1, seed=seed).server.models for seed in (0, 1)]
    assert all(torch.equal(a.flat, b.flat) for a, b in zip(one.models, two.models, strict=True))
    assert len({tuple(w.flat.tolist()) for w in starts[0]}) == 3
    assert not torch.equal(starts[0][1].flat, starts[1][1].flat) and len(other.models) == 3


def test_a_client_is_judged_by_the_best_model_on_its_training_data():
    made = ran(Begun(lr=0.1, batch=0), Camps(), rounds=2)
    for k in range(6):
        assert made.method.predict(node(made.site, k), made.server.models) is made.server.models[k % 2]


def test_only_who_chose_trains_and_only_who_replied_counts():
    made = ran(Begun(lr=0.1, batch=0), Camps(), rounds=6, lost=0.4)
    for round in range(1, 7):
        gone = {k for k in range(6) if made.world.loses(round, 0, k)}
        lines = [
            li for li in made.record.ledger if (li["verb"], li["direction"], li["round"]) == ("means", "down", round)
        ]
        assert {k for line in lines for k in line["clients"]} == set(range(6)) - gone
    assert made.server.models[2].flat.tolist() == STARTS[2]


def test_a_cluster_that_does_not_exist_is_not_taken():
    @dataclass(frozen=True)
    class Liar(Begun):
        @client
        def choose(self, client, models):
            reply = Ifca.choose(self, client, models)
            return {"cluster": 7} if client.id == 0 else reply

    made = ran(Liar(lr=0.1, batch=0), Camps(), rounds=2)
    assert made.server.clusters == {k: c for k, c in CAMPS.items() if k}
    assert len(made.server.models) == 3


def test_what_goes_down_is_all_models_once():
    made = ran(Ifca(k=3), Toy(), rounds=1)
    models = [line for line in made.record.ledger if line["direction"] == "down" and line["kind"] == "train"]
    assert {line["field"] for line in models} == {"models", "envelope"}
