"""PSO-Fed: which coordinates go which way, that nobody stops learning, and least squares by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import Quadratics, ran
from torch import nn

from fedloom import encoding
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.robust.pso_fed import PsoFed
from fedloom.task import Data
from fedloom.tasks.toy import Toy

D, K = 7, 4


class Line(nn.Module):
    """x' w, from w = 0."""

    def __init__(self):
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Linear(D, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(self.body(x))


class Lines(Quadratics):
    """Least squares of y = x' w* + noise, five samples a client."""

    classes = 0
    population = K

    def __init__(self, clients=K):
        draw = torch.Generator().manual_seed(5)
        self.population = clients
        self.x = torch.randn(5 * clients, D, generator=draw, dtype=torch.float64)
        self.truth = torch.randn(D, generator=draw, dtype=torch.float64)
        self.y = self.x @ self.truth + 0.1 * torch.randn(5 * clients, generator=draw, dtype=torch.float64)

    def network(self):
        return Line()

    def data(self, client, split):
        rows = torch.arange(5 * client, 5 * client + 5) if split == "train" else torch.zeros(0, dtype=torch.int64)
        return Data(self.x, self.y, rows)

    def criterion(self, outputs, batch):
        return 0.5 * (outputs[:, 0] - batch.y).square().mean()


def played(task, rounds, places, cohorts, lr=0.1, M=4, stride=1, lost=()):
    """The equations in numpy, with the masks as diagonal matrices: w, w_k, and which coordinates of w moved when."""
    x, y = (t.numpy().reshape(task.population, 5, -1) for t in (task.x, task.y))

    def mask(k, n):
        ones = np.zeros(D)
        ones[:M] = 1
        return np.diag(np.roll(ones, places[k] + (stride or M) * n))

    w, own, eye = np.zeros(D), [np.zeros(D) for _ in range(task.population)], np.eye(D)
    for n in range(1, rounds + 1):
        taken = []
        for k in range(task.population):
            v = own[k]
            if k in cohorts[n]:
                if (n, k) in lost:
                    continue
                v = mask(k, n) @ w + (eye - mask(k, n)) @ own[k]
            e = y[k][:, 0] - x[k] @ v
            own[k] = v + lr * x[k].T @ e / 5
            if k in cohorts[n]:
                taken.append(mask(k, n + 1) @ own[k] + (eye - mask(k, n + 1)) @ w)
        w = np.mean(taken, axis=0) if taken else w
    return w, own


@pytest.mark.parametrize("settings", [{}, {"cohort": 2}, {"cohort": 2, "lost": 0.4}], ids=str)
@pytest.mark.parametrize(("stride", "coordinated"), [(1, False), (0, False), (2, True)])
def test_least_squares_in_numpy(settings, stride, coordinated):
    task = Lines()
    method = PsoFed(lr=0.1, share=0.5, steps=1, batch=0, stride=stride, coordinated=coordinated)
    made = ran(method, task, rounds=9, **settings)
    cohorts = {n: set(made.world.choose(n)) for n in range(1, 10)}
    lost = {(n, k) for n in cohorts for k in cohorts[n] if made.world.loses(n, 0, k)}
    w, own = played(task, 9, made.server.places, cohorts, stride=stride, lost=lost)
    assert np.allclose(made.server.model.flat.numpy(), w, atol=1e-12)
    for k in range(K):
        assert np.allclose(made.engine.states[k]["model"].flat.numpy(), own[k], atol=1e-12)
    assert bool(lost) == ("lost" in settings)


def test_it_comes_to_the_truth_although_most_are_seldom_asked():
    task = Lines(8)
    made = ran(PsoFed(lr=0.3, share=0.3, steps=1, batch=0, stride=1), task, rounds=150, cohort=3)
    assert (made.server.model.flat - task.truth).norm() < 0.15 * task.truth.norm()


def test_bytes_are_those_of_the_shared_coordinates_and_everybody_works():
    made = ran(PsoFed(share=0.1, steps=3), Toy(sizes=(20,) * 4), rounds=3, cohort=1)
    size = made.server.layout.split
    count = -(-size // 10)
    part = encoding.sizes({"part": torch.zeros(count)})["part"]
    lines = [line for line in made.record.ledger if line["kind"] == "train"]
    down = [li["bytes"] for li in lines if li["field"] == "part"]
    up = [li["bytes"] for li in lines if li["field"] == "entries"]
    assert down == [part] * 3 and up == [encoding.sizes({"entries": torch.zeros(count)})["entries"]] * 3
    assert {line["field"] for line in lines} == {"part", "entries", "envelope"}
    assert [row["gradient_steps"] for row in made.record.metrics] == [4 * 3] * 3


@pytest.mark.parametrize("stride", [1, 3])
def test_each_coordinate_has_its_turn(stride):
    method = PsoFed(share=0.4, stride=stride)
    for place in (0, 5):
        turns = np.bincount(np.concatenate([method.coordinates(place, n, 10) for n in range(1, 11)]), minlength=10)
        assert turns.tolist() == [4] * 10
    assert method.coordinates(3, 2, 10).tolist() == [(3 + 2 * stride + i) % 10 for i in range(4)]
    assert len(PsoFed(share=0.01).coordinates(0, 1, 10)) == 1


def test_what_nobody_sent_stays_bitwise_as_it_was():
    made = ran(PsoFed(share=0.1, coordinated=True), Toy(norm=True), rounds=1)
    moved = (made.server.model.flat != made.site.initial.flat).nonzero().flatten().tolist()
    size = made.server.layout.split
    assert set(moved) <= set(made.method.coordinates(0, 2, size).tolist()) and moved
    assert torch.equal(made.server.model.buffers.flat, made.site.initial.buffers.flat)


@dataclass(frozen=True)
class Averaged(Method):
    """FedAvg of one step, plainly."""

    def setup(self, server, clients):
        clients.tell(self.nothing)

    def round(self, server, cohort):
        replies = cohort.call(self.local, model=server.model)
        server.model = server.model + replies.mean("delta").delta

    @client
    def nothing(self, client):
        pass

    @client
    def local(self, client, model):
        return {"delta": -0.1 * client.grad(model, next(client.batches(10)))}


def test_with_all_coordinates_and_everybody_it_is_averaging_after_one_step():
    task = Toy(sizes=(30, 20, 40, 25))
    one, other = ran(PsoFed(share=1.0, steps=1), task, rounds=5), ran(Averaged(), task, rounds=5)
    assert torch.allclose(one.server.model.flat, other.server.model.flat, atol=1e-6)


def test_the_places_are_each_clients_own_and_sent_once():
    apart, alike = (ran(PsoFed(coordinated=flag), Toy(), rounds=2).server.places for flag in (False, True))
    assert len(set(apart)) > 1 and set(alike) == {0}
    made = ran(PsoFed(), Toy(), rounds=2)
    told = [line for line in made.record.ledger if line["verb"] == "tell"]
    assert {line["kind"] for line in told} == {"setup"}
    assert [made.engine.states[k]["place"] for k in range(made.task.population)] == made.server.places
    with pytest.raises(UsageError, match="share is 0"):
        PsoFed(share=0.0)
