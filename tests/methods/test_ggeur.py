"""GGEUR: covariances of all clients' features together, samples invented by them, and a method that trains on both."""

import numpy as np
import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

import fedloom
from fedloom.errors import UsageError
from fedloom.methods.domain import ggeur
from fedloom.methods.domain.ggeur import GGEUR, covariance, factor, some, square, triangle
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.moon import Moon
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.methods.personalize.local import Local
from fedloom.random import stream
from fedloom.tasks.toy import Toy
from fedloom.testing import difference, trace

CLASSES = {0: [1, 2], 1: [0, 2], 2: [0, 1], 3: [0, 1, 2]}  # of Toy's clients


def left(made):
    return [trace(made)[part] for part in ("server", "states")]


def pooled(task, c, clients=range(4)):
    """All training samples of a class at some clients, float64 [n, D]."""
    data = [task.data(k, "train") for k in clients]
    return torch.cat([d.x[d.y == c] for d in data]).double().numpy()


def invented(made, k):
    state = made.engine.states[k]["invented"]
    return state["x"], state["y"]


@pytest.fixture
def covariances(monkeypatch):
    """The covariances that a server makes, and the factors [D, D] of them that it sends."""
    found = []

    def kept(matrix):
        found.append((matrix.clone().numpy(), factor(matrix).numpy()))
        return factor(matrix)

    monkeypatch.setattr(ggeur, "factor", kept)
    return found


@pytest.mark.parametrize("sizes", [(30, 20, 25, 35), (1, 9, 12, 20), (7, 4)])
def test_the_covariance_is_that_of_all_features_together_whoever_has_them(sizes, covariances):
    task = Toy(sizes=sizes)
    ran(GGEUR(FedAvg(), target=60), task, rounds=1)
    found = covariances[-len({int(c) for k in range(len(sizes)) for c in task.data(k, "train").y}) :]
    assert len(found) >= 2
    expected = [np.cov(pooled(task, c, range(len(sizes))).T, bias=True) for c in range(3)]
    for whole, low in found:
        c = min(range(3), key=lambda c: abs(whole - expected[c]).max())
        np.testing.assert_allclose(whole, expected[c], atol=1e-12)
        np.testing.assert_allclose(low @ low.T, expected[c] + 1e-6 * np.eye(6), atol=1e-12)
        assert (np.triu(low, 1) == 0).all()


def test_sums_of_samples_give_the_covariance():
    z = torch.randn(9, 4, generator=stream(0, "z"), dtype=torch.float64) + 3
    found = covariance(9.0, z.sum(0), triangle(z.T @ z))
    np.testing.assert_allclose(found.numpy(), np.cov(z.T.numpy(), bias=True), atol=1e-12)
    # The mean of what several sent is as good as the sum.
    np.testing.assert_allclose(covariance(3.0, z.sum(0) / 3, triangle(z.T @ z) / 3).numpy(), found.numpy(), atol=1e-12)


def test_negative_eigenvalues_are_no_spread():
    turn = torch.linalg.qr(torch.randn(3, 3, generator=stream(1, "turn"), dtype=torch.float64))[0]
    values = torch.tensor([2.0, -0.5, 0.25], dtype=torch.float64)
    low = factor(turn * values @ turn.T)
    expected = turn * values.clamp(min=0) @ turn.T + 1e-6 * torch.eye(3)
    torch.testing.assert_close(low @ low.T, expected, atol=1e-12, rtol=0)


def test_a_triangle_is_a_lower_one():
    matrix = torch.arange(9.0).view(3, 3)
    assert triangle(matrix).tolist() == [0, 3, 4, 6, 7, 8]
    assert torch.equal(square(triangle(matrix), 3), matrix.tril())


@pytest.mark.parametrize("prototypes", [0, 3, 200])
def test_every_class_that_a_client_has_is_filled_up_and_no_other(prototypes):
    task = Toy()
    made = ran(GGEUR(FedAvg(), target=40, prototypes=prototypes), task, rounds=1)
    for k, own in CLASSES.items():
        y, (x, labels) = task.data(k, "train").y, invented(made, k)
        assert {int(c) for c in labels.unique()} == {c for c in own if (y == c).any()}
        counts = torch.bincount(y, minlength=3) + torch.bincount(labels, minlength=3)
        assert counts.tolist() == [40 if (y == c).any() else 0 for c in range(3)]
        assert x.shape == (len(labels), 6) and x.isfinite().all()


def test_a_class_with_enough_samples_stays_as_it_is():
    made = ran(GGEUR(FedAvg(), target=12), Toy(), rounds=1)
    sizes = {k: torch.bincount(made.task.data(k, "train").y, minlength=3).tolist() for k in range(4)}
    assert sizes[0] == [0, 15, 15] and sizes[3] == [12, 12, 11]
    assert "invented" not in made.engine.states.get(0, {})
    assert invented(made, 3)[1].tolist() == [2]


def test_samples_are_spread_around_their_own_by_the_covariance():
    client = node(ran(FedAvg(), Toy(), rounds=1).site, 1)
    one = client.data.x[client.data.y == 0][:1]
    client.given = fedloom.Data(one, torch.zeros(1, dtype=torch.int64))
    matrix = torch.randn(6, 6, generator=stream(3, "matrix"), dtype=torch.float64)
    whole = matrix @ matrix.T
    GGEUR(target=20_001).invent(client, {0: triangle(factor(whole).float()), 2: triangle(torch.eye(6))}, {})
    x, y = client.state["invented"]["x"].double(), client.state["invented"]["y"]
    assert len(x) == 20_000 and not y.any()
    torch.testing.assert_close(x.mean(0), one[0].double(), atol=5 * float(whole.diag().max() / 20_000) ** 0.5, rtol=0)
    torch.testing.assert_close(x.T.cov(), whole, atol=0.06 * float(whole.diag().max()), rtol=0)


@pytest.mark.parametrize(("n", "count"), [(7, 3), (7, 7), (7, 12), (1, 5), (3, 100)])
def test_no_sample_is_drawn_around_more_often_than_needed(n, count):
    seen = torch.stack([some(torch.arange(n)[:, None], count, stream(s, "some")).flatten() for s in range(200)])
    often = torch.stack([torch.bincount(row, minlength=n) for row in seen])
    assert seen.shape == (200, count) and often.max() <= -(-count // n)
    assert (often.double().mean(0) - count / n).abs().max() < 0.15 * max(1.0, count / n), "all of them alike"
    if 1 < count < n:
        assert len({tuple(row.sort().values.tolist()) for row in seen}) > 10


def around(prototypes, missing, n=4, others=2):
    """Where samples are drawn, as counts of own places and of each other client's mean."""
    own = torch.arange(float(n))[:, None]
    means = [torch.tensor([100.0 + j]) for j in range(others)]
    found = GGEUR(prototypes=prototypes).places(own, means, missing, stream(0, "places")).flatten()
    assert len(found) == missing
    return int((found < n).sum()), [int((found == 100 + j).sum()) for j in range(others)]


def test_between_domains_samples_lie_around_own_ones_and_the_means_of_others_in_equal_numbers():
    assert around(50, 150) == (50, [50, 50])
    own, means = around(500, 150)
    assert own + sum(means) == 150 and min(own, *means) > 30, "of as many candidates of each"
    assert around(10, 150) == (130, [10, 10]), "what is missing beyond is around own ones"
    assert around(50, 40, others=0) == (40, [])


def test_means_of_others_are_those_of_the_same_class_and_not_ones_own():
    task = Toy()
    made = ran(FedAvg(), task, rounds=1)
    method, clients = GGEUR(target=31, prototypes=400), [node(made.site, k) for k in range(4)]
    centers = {k: method.average(client)["centers"] for k, client in enumerate(clients)}
    for k in range(4):
        for c, mean in centers[k].items():
            np.testing.assert_allclose(mean.numpy(), pooled(task, c, [k]).mean(0), atol=1e-5)
    still = {c: torch.zeros(21) for c in range(3)}
    method.invent(clients[1], still, centers)  # which has the classes 0 and 2
    x, y = clients[1].state["invented"].values()
    own = clients[1].data
    for c, having in ((0, (2, 3)), (2, (0, 3))):
        mine = {tuple(row) for row in own.x[own.y == c].tolist()}
        theirs = {tuple(centers[k][c].tolist()) for k in having}
        places = {tuple(row) for row in x[y == c].tolist()}
        assert places <= mine | theirs and places & mine and theirs <= places


def test_without_prototypes_nobodys_mean_is_sent():
    plain, several = (ran(GGEUR(FedAvg(), prototypes=p), Toy(), rounds=1) for p in (0, 5))
    fields = [{line["field"] for line in made.record.ledger if line["kind"] == "setup"} for made in (plain, several)]
    assert fields == [{"classes", "factors", "centers"}] * 2 or fields[0] <= fields[1]
    up = [
        {line["function"] for line in made.record.ledger if line["kind"] == "setup" and line["direction"] == "up"}
        for made in (plain, several)
    ]
    assert up == [{"moments"}, {"moments", "average"}]


@pytest.mark.parametrize("inner", [FedAvg(lr=0.1), Scaffold(lr=0.1), Moon(lr=0.1)])
def test_without_a_target_it_is_the_method_inside_bitwise(inner):
    off, on, plain = (ran(method, Toy(), rounds=3) for method in (GGEUR(inner, target=0), GGEUR(inner), inner))
    assert difference(left(off), left(plain)) is None
    assert [row["up_bytes"] for row in off.record.metrics] == [row["up_bytes"] for row in plain.record.metrics]
    assert difference(left(on)[0], left(plain)[0]) is not None


def test_the_upload_of_a_class_does_not_depend_on_how_many_samples_it_has():
    def bytes_of(sizes):
        made = ran(GGEUR(FedAvg()), Toy(sizes=sizes), rounds=1)
        lines = [line for line in made.record.ledger if line["kind"] == "setup" and line["field"] == "classes"]
        return {client: line["bytes"] for line in lines for client in line["clients"]}

    few, many = bytes_of((30, 20, 25, 35)), bytes_of((300, 200, 250, 350))
    assert few == many
    numbers = 8 * (1 + 6 + 6 * 7 // 2)
    assert 0 <= few[0] - 2 * numbers < 2 * 60 and few[3] - few[0] >= numbers, "a class more"


def test_the_method_inside_trains_on_the_clients_own_and_the_invented_samples():
    task = Toy(sizes=(12, 9, 15, 10))
    made = ran(GGEUR(FedAvg(lr=0.1, batch=0), target=20), task, rounds=1)
    layout, start = made.site.initial.layout, made.site.initial.flat
    net, gradient, weights = task.network(), 0.0, 0
    for tensor, view in zip(net.parameters(), layout.views(start), strict=False):
        tensor.data = view.clone()
    for k in range(4):
        own, (x, y) = task.data(k, "train"), invented(made, k)
        loss = F.cross_entropy(net(torch.cat([own.x, x])), torch.cat([own.y, y]))
        n = len(own) + len(y)
        assert n == 20 * len({*own.y.tolist()})
        parts = torch.autograd.grad(loss, list(net.parameters()))
        gradient, weights = gradient + n * torch.cat([p.flatten() for p in parts]), weights + n
    torch.testing.assert_close(made.server.model.flat, start - 0.1 * gradient / weights, atol=1e-6, rtol=0)


def test_samples_are_invented_once():
    first, last = (ran(GGEUR(FedAvg(lr=0.1), target=40), Toy(), rounds=rounds) for rounds in (1, 3))
    for k in range(4):
        assert torch.equal(invented(first, k)[0], invented(last, k)[0])
    assert not torch.equal(invented(first, 0)[0][:5], invented(first, 1)[0][:5])


def test_the_shapes_of_others_teach_clients_that_hear_nothing_else_of_them():
    def accuracy(target, epochs, seed):
        method = GGEUR(Local(lr=0.1, epochs=epochs), target=target)
        given = {"embed": "random:16", "clients": 40, "partition": "iid", "rounds": 2, "eval_every": 2, "seed": seed}
        return fedloom.run(method, "digits", **given).final["personal_test_accuracy"]

    for seed in (0, 1):
        # The same number of steps, and fewer, on the few samples of their own lead less far.
        assert accuracy(36, 1, seed) > max(accuracy(0, epochs, seed) for epochs in (1, 10)) + 0.03


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data": "digits"}, r"inputs here are torch\.float32 of shape \[1, 8, 8\]; set embed=random on images"),
        ({"data": "digits", "embed": "random:4", "problem": "stream:2,rounds=1"}, "does not go with problem=stream"),
        ({"data": "digits", "embed": "random:4", "secure": "bonawitz"}, "does not go with secure=bonawitz"),
        ({"data": "digits", "embed": "random:4", "dp": "sample:noise=1,clip=1"}, "reads client.data"),
    ],
)
def test_what_it_cannot_be_used_on_is_refused(settings, told):
    with pytest.raises(UsageError, match=told):
        fedloom.run("ggeur", clients=3, rounds=2, **settings)


def test_texts_without_an_encoder_are_refused(tmp_path):
    lines = (f"the {i}th of some sentences on class number {i % 2} is here,{i % 2}\n" for i in range(60))
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(lines))
    with pytest.raises(UsageError, match=r"inputs here are torch\.int64 of shape .* embed=sentence on texts"):
        fedloom.run("ggeur", str(tmp_path / "texts.csv"), clients=3, partition="iid", rounds=1)
