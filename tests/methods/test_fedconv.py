"""FedConv: small models by convolutions over the weights of a large one, and back by transposed ones."""

from functools import partial

import numpy as np
import pytest
import torch
from problems import node, ran
from torch import nn

from fedloom import nets
from fedloom.errors import UsageError
from fedloom.methods.heterogeneous._filters import activated, convolved, fresh, matrices, through
from fedloom.methods.heterogeneous.fedconv import FedConv, parted
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.nets.narrow import narrower
from fedloom.random import seeded, stream
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector

UNFITTED = {"public_epochs": 0, "fit_epochs": 0}


def wide_and_narrow(name, shape, share):
    with seeded(0, "model", "init"):
        wide = nets.build(name, shape, 5)
        narrow = narrower(nets.build(name, shape, 5), share)
    return Vector.of(wide), Layout.of(narrow), wide, narrow


def by_hand(x, scale, offset, gain, kernel, grow, residual):
    """One matrix through one filter, in plain loops."""
    x, kernel = np.asarray(x, dtype=float), np.asarray(kernel, dtype=float)
    y = scale * x + offset + (x if residual else 0)
    k = gain * kernel / np.sqrt((kernel**2).sum())
    a, b = k.shape
    if grow:
        out = np.zeros((y.shape[0] + a - 1, y.shape[1] + b - 1))
        for i in range(y.shape[0]):
            for j in range(y.shape[1]):
                out[i : i + a, j : j + b] += y[i, j] * k
    else:
        out = np.array(
            [[(y[i : i + a, j : j + b] * k).sum() for j in range(y.shape[1] - b + 1)] for i in range(len(y) - a + 1)]
        )
    return out


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_filters_by_hand(grow, residual):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, generator=draw)
    its = {"scale": torch.randn(3, generator=draw), "offset": torch.randn(3, generator=draw)}
    its |= {"gain": torch.rand(3, generator=draw), "kernel": torch.randn(3, 2, 3, generator=draw)}
    found = convolved(x, its, grow, residual)
    for k in range(3):
        one = {name: value[k].numpy() for name, value in its.items()}
        np.testing.assert_allclose(found[k], by_hand(x[k], **one, grow=grow, residual=residual), rtol=1e-4, atol=1e-5)
    assert activated(torch.tensor([2.0, -2.0])).tolist() == pytest.approx([1.7, -0.002])


@pytest.mark.parametrize(("name", "shape"), [("cnn:8,12,20", (3, 16, 16)), ("mlp:12,8", (1, 4, 4))])
def test_there_and_back_has_the_large_shapes_and_every_place_its_own_filter(name, shape):
    w, small, _, _ = wide_and_narrow(name, shape, 0.5)
    filters = fresh(w.layout, small, stream(0, "filters"))
    down = through(w, small, filters, grow=False)
    assert down.layout == small and 0.15 < small.size / w.layout.size < 0.6
    back = through(down, w.layout, filters, grow=True)
    assert back.layout == w.layout and back.flat.isfinite().all()
    for entry in small.names:
        if entry not in filters:
            assert torch.equal(down[entry], w[entry])
            continue
        x = matrices(w[entry])
        residual = w[entry].dim() == 4
        whole = np.stack(
            [
                by_hand(x[k], **{n: v[k].numpy() for n, v in filters[entry].items()}, grow=False, residual=residual)
                for k in range(len(x))
            ]
        )
        whole = np.where(whole > 0, 0.85 * whole, 0.001 * whole)
        expected = whole.transpose(1, 2, 0).reshape(down[entry].shape) if residual else whole.reshape(down[entry].shape)
        np.testing.assert_allclose(down[entry], expected, rtol=1e-4, atol=1e-5)
    assert f"{list(small.names)[-1]}" == "head.bias" and "head.bias" not in filters, "all classes go out"


def test_running_statistics_are_cut_and_filled_up():
    with seeded(0, "model", "init"):
        wide, narrow = Toy(norm=True).network(), narrower(Toy(norm=True).network(), 0.5)
    w, small = Vector.of(wide), Layout.of(narrow)
    for n, name in enumerate(n for n in w if "running" in n):
        w[name].copy_(torch.arange(8.0) + n + 2)
    filters = fresh(w.layout, small, stream(0, "filters"))
    down = through(w, small, filters, grow=False)
    mean, var = (name for name in small.names if "running" in name)
    assert down[mean].tolist() == [2, 3, 4, 5] and down[var].tolist() == [3, 4, 5, 6]
    back = through(down, w.layout, filters, grow=True)
    assert back[mean].tolist() == [2, 3, 4, 5, 0, 0, 0, 0] and back[var].tolist() == [3, 4, 5, 6, 1, 1, 1, 1]


def test_a_narrow_network_has_a_share_of_the_channels():
    _, _, _, narrow = wide_and_narrow("cnn:8,12,20", (3, 16, 16), 0.75)
    shapes = {name: list(p.shape) for name, p in narrow.named_parameters() if p.dim() > 1}
    assert shapes == {
        "body.conv1.weight": [6, 3, 5, 5],
        "body.conv2.weight": [9, 6, 5, 5],
        "body.fc1.weight": [15, 9],
        "head.weight": [5, 15],
    }
    assert narrow(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(UsageError, match="no chain of layers"):
        narrower(nets.build("resnet8", (3, 8, 8), 5), 0.5)
    with pytest.raises(UsageError, match="GroupNorm, cannot be narrowed; take linear layers or convolutions"):
        narrower(nets.build("resnet8:group", (3, 8, 8), 5), 0.5)
    odd = nn.Module()
    odd.body, odd.head = nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 2)
    with pytest.raises(UsageError, match="groups of channels"):
        narrower(odd, 0.5)


def test_with_large_models_alone_and_nothing_fitted_it_is_fedavg():
    made, plain = (ran(m, Toy(), rounds=3) for m in (FedConv(sizes=(0,), **UNFITTED), FedAvg()))
    torch.testing.assert_close(made.server.model.flat, plain.server.model.flat, rtol=0, atol=1e-6)


def test_a_round_without_fits_by_hand():
    method, task = FedConv(sizes=(0, 1), **UNFITTED), Toy((20, 30, 12))
    made = ran(method, task, rounds=1)
    server, start = made.server, made.site.initial
    total = torch.zeros_like(start.flat)
    for k, n in enumerate((20, 30, 12)):
        client = node(made.site, k)
        if k == 1:
            small = through(start, made.site.nets["1"].layout, server.filters["1"], grow=False)
            trained = method.local(client, small)["model"]
            grown = through(trained, start.layout, server.growers[1], grow=True)
        else:
            grown = method.local(client, start)["model"]
        total += n / 62 * grown.flat
    torch.testing.assert_close(server.model.flat, total, rtol=0, atol=1e-6)
    assert set(server.growers) == {1} and all((v == 1).all() for v in server.weights.values())


def held_loss(server, w):
    data = server.own.all()
    rows = parted(data)[1]
    return server.task.criterion(server.scores(w, data.x[rows]), type(data)(data.x[rows], data.y[rows])).item()


def test_a_fit_never_ends_worse_than_it_began_and_moves_only_what_is_fitted():
    made = ran(FedConv(**UNFITTED), Toy(), rounds=1)
    server, method = made.server, FedConv(fit_epochs=15)
    wide = server.model
    make = partial(through, wide, server.nets["1"].layout, grow=False)
    before = wide.clone()
    fitted = method.fitted(server, server.filters["1"], make)
    first, last = (held_loss(server, make(f)) for f in (server.filters["1"], fitted))
    assert last < first - 0.01 and torch.equal(wide.flat, before.flat)
    wild = FedConv(fit_epochs=5, fit_lr=50.0).fitted(server, server.filters["1"], make)
    assert held_loss(server, make(wild)) <= first
    assert [int(part.sum()) for part in parted(server.own.all())] == [29, 7]


def test_what_is_fitted_is_kept_for_the_next_round_by_size_and_by_client():
    one, two = (ran(FedConv(fit_epochs=3), Toy((20,) * 6), rounds=n).server for n in (1, 2))
    assert set(one.filters) == {"1", "2"} and set(one.growers) == {1, 2, 4, 5} and set(one.weights) == set(range(6))
    name = "body.0.weight"
    assert not torch.equal(one.growers[1][name]["kernel"], one.growers[4][name]["kernel"]), "one for each client"
    for before, after in ((one.filters["1"], two.filters["1"]), (one.growers[1], two.growers[1])):
        moved = (before[name]["kernel"] - after[name]["kernel"]).norm() / before[name]["kernel"].norm()
        assert 0 < moved < 0.5, "it goes on from where it was"
    assert all((v != 1).any() for v in one.weights.values())
    plain = [ran(FedConv(**UNFITTED), Toy((20,) * 6), rounds=n).server.growers[1] for n in (1, 2)]
    assert torch.equal(plain[0][name]["kernel"], plain[1][name]["kernel"]), "and is not drawn anew"


def test_messages_are_as_large_as_the_small_model():
    made = ran(FedConv(**UNFITTED), Toy(), rounds=1)
    sizes = [made.site.initial.layout.size, *(w.layout.size for w in made.site.nets.values())]
    assert sizes == [8 * 6 + 8 + 3 * 8 + 3, 6 * 6 + 6 + 3 * 6 + 3, 4 * 6 + 4 + 3 * 4 + 3]
    for way in ("up", "down"):
        lines = [x for x in made.record.ledger if (x["direction"], x["kind"], x["field"]) == (way, "train", "model")]
        for k, size in enumerate(sizes):
            (found,) = [line["bytes"] for line in lines if k in line["clients"]]
            assert 0 <= found - 4 * size < 150


def test_public_data_train_the_large_model_and_what_clients_send():
    task = Toy((20, 20))
    made = ran(FedConv(sizes=(0,), public_epochs=3, fit_epochs=0), task, rounds=1)
    plain = ran(FedConv(sizes=(0,), **UNFITTED), task, rounds=1)
    steps = [run.record.metrics[0]["gradient_steps"] for run in (made, plain)]
    assert steps[0] - steps[1] == 3 * 3 * 4, "of the large model and of both replies"
    moved = (made.server.model - plain.server.model).flat.abs().mean()
    assert 0.005 < moved < 0.1, "six epochs of four steps of 0.001"


def test_what_makes_no_sense_is_refused():
    for fields in ({"shrink": 1.0}, {"sizes": ()}, {"sizes": (0, -1)}):
        with pytest.raises(UsageError, match=r"fedconv.shrink is .*, fedconv.sizes .*; a share below 1"):
            FedConv(**fields)
