"""Rules that know the model sent: IDA and L-DAWA, against numpy, and what they are told of replies."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import ran
from torch import nn

import fedloom
from fedloom.aggregators import Context, Piece, apply, build
from fedloom.boundary.aggregate import Aggregate
from fedloom.boundary.faults import Faults
from fedloom.calls import Call
from fedloom.encoding import same
from fedloom.errors import UsageError
from fedloom.mean import Sum
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.random import stream
from fedloom.site import Site
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab
from fedloom.vector import Vector

# Six columns of a model in two tensors, a scalar of it, and two that are something else.
PIECES = (
    Piece("delta", "weight", (2, 2), slice(0, 4), "difference"),
    Piece("delta", "bias", (2,), slice(4, 6), "difference"),
    Piece("delta", "scale", (), slice(6, 7), "difference"),
    Piece("shift", "weight", (2,), slice(7, 9)),
)
MODEL = slice(0, 7)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=stream(seed, "test", "divergence"))


def judged(rule, stack, sent=None, pieces=PIECES, **context):
    return build(rule)(stack, Context(pieces=pieces, sent=sent, **context))


def as_models(pieces=PIECES):
    return tuple(piece._replace(origin=piece.origin and "model") for piece in pieces)


# IDA


def ida(stack, norm=1, eps=1e-8, claimed=1.0):
    models = stack[:, MODEL].double().numpy()
    apart = np.linalg.norm(models - models.mean(0), ord=norm, axis=1)
    r = claimed * (1 + eps) / (eps + apart)
    return r / r.sum()


@pytest.mark.parametrize("seed", range(5))
def test_ida_weighs_by_the_inverse_distance_of_models_from_their_plain_mean(seed):
    stack = draws(5, 9, seed=seed) * torch.tensor([1.0, 2, 3, 1, 1, 1, 1, 50, 50])
    claims = torch.tensor([1.0, 9.0, 3.0, 2.0, 5.0])
    for text, weight in (
        ("ida", ida(stack)),
        ("ida:norm=l2", ida(stack, norm=2)),
        ("ida:eps=1", ida(stack, eps=1.0)),
        ("ida:weighted=true", ida(stack, claimed=claims.numpy())),
    ):
        value, got = judged(text, stack, weights=claims)
        assert np.allclose(got.numpy(), weight, rtol=1e-9), text
        assert np.allclose(value.numpy(), weight @ stack.double().numpy(), rtol=1e-5, atol=1e-6), text


def test_of_two_models_each_weighs_a_half_whatever_their_sizes():
    _, weight = judged("ida", draws(2, 9), weights=torch.tensor([1.0, 99.0]))
    assert weight.tolist() == pytest.approx([0.5, 0.5], rel=1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("count", [3, 10])
def test_one_other_model_weighs_the_same_at_any_distance(norm, count):
    for distance in (1.0, 1e4):
        stack = draws(1, 9).repeat(count, 1)
        stack[-1] += distance * draws(9, seed=1)
        _, weight = judged(f"ida:norm={norm}", stack)
        assert weight[-1].item() == pytest.approx(1 / ((count - 1) ** 2 + 1), rel=1e-5)


@pytest.mark.parametrize("text", ["ida", "ida:eps=0", "ida:norm=l2"])
def test_equal_models_weigh_the_same(text):
    value, weight = judged(text, draws(1, 9).repeat(4, 1))
    assert torch.equal(weight, torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.allclose(value, draws(1, 9)[0])


def test_a_model_at_the_mean_weighs_everything_without_eps():
    stack = torch.zeros(3, 9)
    stack[0], stack[1] = 1.0, -1.0
    assert judged("ida:eps=0", stack).weight.tolist() == [0, 0, 1]


def test_the_order_of_replies_does_not_matter():
    stack, order = draws(6, 9), torch.tensor([3, 0, 5, 1, 4, 2])
    for text in ("ida", "l_dawa"):
        one, other = judged(text, stack, draws(9)), judged(text, stack[order], draws(9))
        assert torch.allclose(one.value, other.value, atol=1e-6)
        assert torch.allclose(one.weight[order], other.weight)


# L-DAWA


def l_dawa(models, sent, pieces):
    """New models in numpy, tensor by tensor: what is no model, and scalars, are averaged."""
    new = models.mean(0)
    for piece in pieces:
        if piece.origin and piece.shape:
            rows, w = models[:, piece.columns], sent[piece.columns]
            weighed = np.zeros_like(w)
            for row in rows:
                lengths = np.linalg.norm(row) * np.linalg.norm(w)
                weighed += row * (row @ w / lengths if lengths else 1.0)
            new[piece.columns] = weighed / len(rows)
    return new


@pytest.mark.parametrize("seed", range(5))
def test_l_dawa_scales_every_tensor_by_its_cosine(seed):
    sent, stack = draws(9, seed=seed + 50), draws(5, 9, seed=seed)
    sent[7:] = 0  # it came with no origin
    expected = l_dawa((stack + sent).double().numpy(), sent.double().numpy(), PIECES)
    value, weight = judged("l_dawa", stack, sent)
    assert np.allclose(value.numpy(), expected - sent.numpy(), atol=1e-6)
    assert np.allclose(judged("l_dawa", stack + sent, sent, as_models()).value.numpy(), expected, atol=1e-6)
    assert torch.equal(weight, torch.full((5,), 0.2, dtype=torch.float64)), "statistics are averaged plainly"
    assert ((stack + sent)[:, :4] @ sent[:4]).min() < 0 or seed != 1, "negative cosines are among them"


def test_models_as_they_were_sent_stay_and_scaled_ones_give_the_mean_scale():
    sent = draws(9)
    assert torch.allclose(judged("l_dawa", sent.repeat(3, 1), sent, as_models()).value, sent, atol=1e-6)
    assert torch.allclose(judged("l_dawa", torch.zeros(3, 9), sent).value, torch.zeros(9), atol=1e-6)
    scaled = torch.tensor([[0.5], [1.0], [3.0]]) * sent
    assert torch.allclose(judged("l_dawa", scaled, sent, as_models()).value, 1.5 * sent, atol=1e-6)


def test_an_orthogonal_tensor_gives_nothing_and_an_opposite_one_itself():
    sent = torch.tensor([1.0, 0, 0, 0, 1, 0, 2, 0, 0])
    model = torch.tensor([0.0, 3, 0, 0, -1, 0, 4, 5, 6])
    assert judged("l_dawa", model[None], sent, as_models()).value.tolist() == [0, 0, 0, 0, 1, 0, 4, 5, 6]


def test_new_biases_and_lost_ones_are_averaged():
    sent, models = draws(9), draws(3, 9, seed=1)
    sent[4:6] = 0
    assert torch.allclose(judged("l_dawa", models, sent, as_models()).value[4:6], models[:, 4:6].mean(0))
    sent, models[1, 4:6] = draws(9), 0
    expected = l_dawa(models.double().numpy(), sent.double().numpy(), PIECES)
    assert np.allclose(judged("l_dawa", models, sent, as_models()).value.numpy(), expected, atol=1e-6)


def test_tensors_only_shrink():
    sent, models = draws(9), draws(6, 9, seed=2)
    value = judged("l_dawa", models, sent, as_models()).value
    for piece in PIECES[:2]:
        assert value[piece.columns].norm() <= models[:, piece.columns].norm(dim=1).mean()


def test_statistics_follow_by_the_plain_mean():
    stack, sent = draws(4, 11), draws(11, seed=1)
    learned = torch.ones(11, dtype=torch.bool)
    learned[[4, 5]] = False
    verdict = apply(build("l_dawa"), stack, Context(pieces=PIECES, sent=sent), learned)
    alone = judged("l_dawa", stack[:, learned], sent[learned])
    assert torch.equal(verdict.value[learned], alone.value)
    assert torch.allclose(verdict.value[~learned], stack[:, ~learned].mean(0))


@pytest.mark.parametrize("text", ["ida", "l_dawa"])
def test_replies_without_a_model_are_told(text):
    with pytest.raises(UsageError, match="compares models"):
        judged(text, draws(3, 9), draws(9), tuple(piece._replace(origin=None) for piece in PIECES))


@pytest.mark.parametrize("text", ["ida", "l_dawa"])
def test_what_stands_before_them(text):
    stack, sent = draws(6, 9), draws(9, seed=1)
    assert torch.allclose(judged(f"nnm:f=0+{text}", stack, sent).value, stack.mean(0), atol=1e-5) == (text == "ida")
    assert build(f"bucketing:s=2+{text}").needs_models and not build("bucketing:s=2+median").needs_models
    with pytest.raises(UsageError, match="random pieces"):
        build(f"gas:f=1+{text}")


# What a rule is told


class Net(nn.Module):
    """A convolution, whose numbers lie channels last, statistics, and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 2)


def asked(rule="l_dawa", method=None, **message):
    stage = Aggregate.of(rule, method or FedAvg())
    return stage, Call("mean", "local", (0, 1), message, {}, "train", 1, 0)


def told(reply, method=None, **message):
    stage, call = asked(method=method, **message)
    like = Sum.of(reply, 1.0)
    sent = torch.zeros(len(like.row(like)))
    return stage.begun(call, like, sent), sent, like


def test_pieces_are_the_tensors_of_vectors_in_their_place():
    w = Vector.of(Net())
    w.flat.copy_(torch.arange(float(len(w))))
    model = w * 3.0
    reply = {"n": 2.0, "delta": w, "protos": {4: torch.ones(2, 3)}, "model": w}
    pieces, sent, like = told(reply, model=model)
    row = like.row(like)[like.learned(torch.device("cpu"))]
    sent = sent[like.learned(torch.device("cpu"))]
    assert [(p.field, p.tensor, p.origin) for p in pieces[:2]] == [
        ("n", "", None),
        ("delta", "conv.weight", "difference"),
    ]
    names, size = list(w.layout.names[: w.layout.parameters]), w.layout.split
    assert [p.tensor for p in pieces] == ["", *names, "", *names]
    assert pieces[1 + len(names)] == Piece("protos.4", "", (2, 3), slice(1 + size, 7 + size))
    assert pieces[-1].columns.stop == len(row) == 2 * size + 7 and pieces[-1].origin == "model"
    for piece in pieces:
        if piece.tensor:
            assert torch.equal(row[piece.columns].sort().values, w[piece.tensor].flatten().sort().values), piece
            assert torch.equal(sent[piece.columns], 3 * row[piece.columns]), piece
        else:
            assert not sent[piece.columns].any()


def test_models_and_differences_are_told_apart():
    w = Vector.of(nn.Linear(2, 2))
    other = Vector.of(nn.Linear(3, 2))

    def origins(reply, **message):
        return {piece.field: piece.origin for piece in told(reply, **message)[0]}

    assert origins({"model": w, "delta": w}, model=w) == {"model": "model", "delta": "difference"}
    assert origins({"delta": w}, delta=w, model=w) == {"delta": "model"}, "it came by its own name"
    assert origins({"delta": w}, model=other) == {"delta": None}
    assert origins({"delta": w, "shift": w}, model=w, control=w) == {"delta": "difference", "shift": None}
    assert origins({"delta": w}, body=w) == {"delta": None}
    assert origins({"delta": w}, body=w, method=fedloom.method.build("fedrep")) == {"delta": "difference"}
    assert origins({"delta": w}, shared=w, method=fedloom.method.build("fedbn")) == {"delta": "difference"}
    assert origins({"model": w}, start=w, method=fedloom.method.build("fedcac")) == {"model": "model"}
    assert origins({"model": w}, method=fedloom.method.build("dfedsam")) == {"model": None}, "it lies at the client"


# In a run


@dataclass(frozen=True)
class Whole(Method):
    """FedAvg whose clients send their models."""

    def round(self, server, cohort):
        server.model = cohort.mean(self.local, weight="n", model=server.model).model

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=0.05, epochs=1, batch=10)
        return {"model": w, "n": client.n}


@dataclass(frozen=True)
class Slopes(Method):
    """Clients send gradients under a name that says nothing."""

    def round(self, server, cohort):
        server.model = server.model - 0.1 * cohort.mean(self.slope, model=server.model).slope

    @client
    def slope(self, client, model):
        return {"slope": client.grad(model, client.data.all())}


@dataclass(frozen=True)
class Both(Whole):
    """After their models, they send gradients."""

    def round(self, server, cohort):
        server.model = cohort.mean(self.local, weight="n", model=server.model).model
        server.model = server.model - 0.1 * cohort.mean(self.slope, model=server.model).slope

    @client
    def slope(self, client, model):
        return {"slope": client.grad(model, client.data.all())}


TOY = Toy((30, 20, 25, 35, 22))


@pytest.mark.parametrize("rule", ["ida", "l_dawa"])
def test_the_models_of_a_round_become_what_the_paper_says(rule, monkeypatch):
    """Models by themselves and differences are one: both against numpy on the tensors that clients had."""
    seen = []

    def outcomes(self, books, call, outcomes):
        seen.append([outcome.reply["delta"] for outcome in outcomes])
        return outcomes

    monkeypatch.setattr(Faults, "outcomes", outcomes)
    made = ran(FedAvg(lr=0.05, epochs=1, batch=10), TOY, 1, aggregate=rule, faults="late:0")
    w = Site(TOY, 0).initial
    models = np.stack([(w + delta).flat.double().numpy() for delta in seen[-1]])
    if rule == "ida":
        apart = np.abs(models - models.mean(0)).sum(1)
        expected = (1 / (1e-8 + apart)) @ models / (1 / (1e-8 + apart)).sum()
    else:
        named = [(w[name], [(w + delta)[name] for delta in seen[-1]]) for name in w]
        expected = np.concatenate([flat_dawa(sent, its) for sent, its in named])
    assert np.allclose(made.server.model.flat.numpy(), expected, atol=1e-6)
    whole = ran(Whole(), TOY, 1, aggregate=rule)
    assert torch.allclose(whole.server.model.flat, made.server.model.flat, atol=1e-6)
    assert not torch.allclose(whole.server.model.flat, ran(Whole(), TOY, 1).server.model.flat, atol=1e-6)


def flat_dawa(sent, models):
    w = sent.flatten().double().numpy()
    rows = [model.flatten().double().numpy() for model in models]
    length = np.linalg.norm
    return sum(row * (row @ w / length(row) / length(w) if length(row) * length(w) else 1.0) for row in rows) / len(
        rows
    )


@pytest.mark.parametrize("rule", ["ida", "l_dawa", "nnm:f=2+ida", "bucketing:s=2+l_dawa"])
@pytest.mark.parametrize("method", [Slopes(), Both()])
def test_a_method_whose_clients_send_no_models_is_refused_before_its_first_round(rule, method, tmp_path):
    """Also where that shows in a round's second call, and the problem it is tried on has too few clients for nnm."""
    with pytest.raises(UsageError, match="compares models"):
        fedloom.run(method, TOY, aggregate=rule, out=tmp_path / "run", rounds=3)
    assert not (tmp_path / "run").exists()
    ran(method, TOY, 1, aggregate="median")


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedrep", "fedbn", "fednova", "feddyn", "fot"])
def test_methods_whose_clients_send_models_take_both(name):
    method = fedloom.method.build(name)
    for rule in ("ida", "l_dawa"):
        task = Lab(method).toy()
        made = ran(method, task, 2, aggregate=rule)
        assert not same(made.server.values, ran(method, task, 2).server.values)
