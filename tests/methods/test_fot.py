"""FOT: the space of old inputs, and steps that stay out of it."""

import pytest
import torch
from problems import node, ran
from torch import nn
from torch.nn import functional as F

from fedloom import tasks
from fedloom.methods.continual.fot import FOT, columns, fan, projected
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.runs.spec import Spec
from fedloom.tasks.stream import toy
from fedloom.world import World

EQUAL = toy(sizes=(20, 20, 20, 20))


def test_the_first_task_is_fedavg_bitwise():
    made, plain = ran(FOT(), EQUAL, rounds=2), ran(FedAvg(), EQUAL, rounds=2)
    assert torch.equal(made.server.model.flat, plain.server.model.flat)
    later = [ran(method, EQUAL, rounds=4).server.model.flat for method in (FOT(), FedAvg())]
    assert not torch.equal(*later)


def test_later_steps_are_orthogonal_to_the_space_and_old_answers_stay():
    before, after = (ran(FOT(eps=0.9), EQUAL, rounds=rounds) for rounds in (2, 3))
    basis = before.server.bases["body.0"]
    assert 0 < basis.shape[1] < 7
    step = after.server.model - before.server.model
    rows = torch.cat([step["body.0.weight"], step["body.0.bias"][:, None]], 1)
    assert rows.norm() > 1e-2 and (rows @ basis).norm() < 1e-5
    inputs = basis @ torch.randn(basis.shape[1], 9)
    old, new = (
        torch.cat([made.server.model["body.0.weight"], made.server.model["body.0.bias"][:, None]], 1) @ inputs
        for made in (before, after)
    )
    torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-4)


def test_bases_are_orthonormal_and_never_shrink():
    one, two = (ran(FOT(eps=0.9), EQUAL, rounds=rounds).server.bases["body.0"] for rounds in (2, 4))
    for basis in (one, two):
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
    assert two.shape[1] >= one.shape[1]
    assert torch.linalg.matrix_norm(two @ (two.T @ one) - one) < 1e-4, "what was kept is kept"


def test_the_space_of_all_clients_inputs_is_found():
    method, layer = FOT(eps=0.999), nn.Linear(9, 4)
    draw = torch.Generator().manual_seed(0)
    space = torch.linalg.qr(torch.randn(10, 3, generator=draw)).Q
    sums = torch.zeros(10, 50)
    for _ in range(5):  # clients, each with a part of it
        x = space @ torch.randn(3, 30, generator=draw)
        sums += x @ torch.randn(30, 50, generator=draw)
    found = method.grown(torch.zeros(fan(layer), 0), {"sketch": sums, "ratio": 5.0, "n": 5.0}, 0.999)
    assert found.shape == (10, 3)
    torch.testing.assert_close(found @ (found.T @ space), space, rtol=0, atol=1e-4)
    assert method.grown(space, {"sketch": sums, "ratio": 0.0005, "n": 5.0}, 0.999) is space, "it holds enough already"


def test_patches_are_what_a_convolution_multiplies():
    layer, x = nn.Conv2d(2, 5, 3, stride=2, padding=1), torch.randn(4, 2, 7, 7)
    rows = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
    expected = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close((rows @ columns(layer, x)), expected)
    assert len(columns(layer, x)) == fan(layer)
    basis = torch.linalg.qr(columns(layer, x[:1]))[0][:, :4]
    from fedloom.vector import Vector

    step = projected(Vector.of(nn.ModuleDict({"c": nn.Conv2d(2, 5, 3)})), "c", basis)
    assert (torch.cat([step["c.weight"].flatten(1), step["c.bias"][:, None]], 1) @ basis).norm() < 1e-5


def test_only_the_last_round_of_a_task_sends_more():
    made = ran(FOT(), EQUAL, rounds=4)
    sizes = {}
    for line in made.record.ledger:
        if line["kind"] == "train":
            sizes.setdefault((line["direction"], line["field"]), {})[line["round"]] = line["bytes"]
    assert set(sizes["up", "sketches"]) == {2, 4}
    assert 4 * 5 * 7 * 7 < sizes["up", "sketches"][2] < 4 * 5 * 7 * 7 + 120
    assert sizes["down", "bases"][1] < 12


def test_a_stream_of_digits_is_forgotten_less():
    task = tasks.build(Spec(clients=5, problem="stream:5,rounds=3", partition="iid", model="mlp:30"))
    forgetting, last = {}, {}
    for name, method in {"fot": FOT(lr=0.5, epochs=5, eps=0.8), "fedavg": FedAvg(lr=0.5, epochs=5)}.items():
        at = ran(method, task, rounds=15, eval_every=3).record.metrics[2::3]
        learned = [at[t][f"global_test_task{t + 1}"] for t in range(5)]
        last[name] = [at[4][f"global_test_task{t + 1}"] for t in range(5)]
        forgetting[name] = sum(a - b for a, b in zip(learned[:4], last[name][:4], strict=True)) / 4
    assert forgetting["fedavg"] > 0.04 > 0.01 > forgetting["fot"]
    assert sum(last["fot"]) > sum(last["fedavg"])


def test_sketches_are_linear_in_the_clients():
    made = ran(FOT(), EQUAL, rounds=1)
    client = node(made.site, 0)
    net = client.net(made.site.initial)
    found = made.method.sketched(client, net, {"body.0": torch.zeros(7, 0)}, client.data)["body.0"]
    assert found["sketch"].shape == (7, 35) and found["ratio"] == pytest.approx(client.n)
    x = F.pad(client.data.x, (0, 1), value=1.0).T
    inside = torch.linalg.lstsq(x, found["sketch"]).solution
    torch.testing.assert_close(x @ inside, found["sketch"], rtol=1e-3, atol=1e-2)


def test_a_task_whose_last_round_was_lost_is_protected_before_the_next_one_learns(monkeypatch):
    """The space then comes of the model that the server has, on the ended task's data, and no step leaves it alone."""
    silent = World.loses
    monkeypatch.setattr(World, "loses", lambda self, round, nth, k: round == 2 or silent(self, round, nth, k))
    kept, made = (ran(FOT(eps=0.9), EQUAL, rounds=rounds, lost=1e-9) for rounds in (2, 3))
    assert "kept its values" in kept.record.metrics[1]["note"] and kept.server.protected == 0
    basis = made.server.bases["body.0"]
    assert made.server.protected == 1 and 0 < basis.shape[1] < 7
    step = made.server.model - kept.server.model
    rows = torch.cat([step["body.0.weight"], step["body.0.bias"][:, None]], 1)
    assert rows.norm() > 1e-2 and (rows @ basis).norm() < 1e-5
    old = torch.cat([EQUAL.at(2).data(k, "train").x for k in range(4)])
    new = torch.cat([EQUAL.at(3).data(k, "train").x for k in range(4)])
    inside = [(F.pad(x, (0, 1), value=1.0) @ basis).norm() / F.pad(x, (0, 1), value=1.0).norm() for x in (old, new)]
    assert inside[0] > max(inside[1], 0.9), "it is the space of the ended task"


def test_a_stream_that_ends_unheard_is_protected_as_often_as_tasks_were():
    made = ran(FOT(eps=0.9), EQUAL, rounds=4, lost=0.3)
    assert made.server.protected in (1, 2) and made.server.eps == pytest.approx(0.9 + 0.001 * made.server.protected)


def test_a_sketch_is_of_what_lies_outside_the_space():
    made = ran(FOT(), EQUAL, rounds=1)
    client, draw = node(made.site, 1), torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(7, 3, generator=draw)).Q
    net, data = client.net(made.site.initial), client.data
    found = made.method.sketched(client, net, {"body.0": basis}, data)["body.0"]
    x = F.pad(data.x, (0, 1), value=1.0).double().T
    rest = x - basis.double() @ (basis.double().T @ x)
    scale = found["sketch"].norm()
    assert scale > 1 and (basis.T @ found["sketch"]).norm() < 1e-5 * scale
    assert found["n"] == 20 and found["ratio"] == pytest.approx(20 * float(rest.norm() / x.norm()), rel=1e-5)


def test_batches_and_clients_draw_an_omega_of_their_own():
    made, found = ran(FOT(), EQUAL, rounds=1), []
    method, data = FOT(batch=2), node(made.site, 0).data
    for k in range(2):
        client, few = node(made.site, k), type(data)(data.x[:6], data.y[:6])
        net = client.net(made.site.initial)
        found.append(method.sketched(client, net, {"body.0": torch.zeros(7, 0)}, few)["body.0"]["sketch"])
    assert torch.linalg.matrix_rank(found[0], rtol=1e-4) == 6, "two columns at a time, three times"
    assert not torch.allclose(*found, atol=1e-2)


@pytest.mark.parametrize("held", [0, 2])
@pytest.mark.parametrize(("ratio", "eps"), [(1.0, 0.9), (0.6, 0.9), (0.25, 0.8), (0.7, 0.5), (0.101, 0.9)])
def test_directions_are_as_few_as_hold_what_is_missing(held, ratio, eps):
    """rho |R| / |X| with rho the least share of the sketch's energy that leaves 1 - eps."""
    draw = torch.Generator().manual_seed(3)
    frame = torch.linalg.qr(torch.randn(8, 8, generator=draw).double()).Q
    basis, left = frame[:, :held], frame[:, held:]
    values = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 0.3])[: 8 - held].double()
    turned = torch.linalg.qr(torch.randn(20, len(values), generator=draw).double()).Q
    sketch = (left[:, : len(values)] * values) @ turned.T
    grown = FOT().grown(basis.float(), {"sketch": sketch.float(), "ratio": 40 * ratio, "n": 40.0}, eps)
    energy = [float(values[:k].square().sum() / values.square().sum()) for k in range(len(values) + 1)]
    need = next(k for k, share in enumerate(energy) if share >= (ratio - (1 - eps)) / ratio)
    assert grown.shape == (8, held + need)
    space = frame[:, : held + need].float()
    torch.testing.assert_close(grown @ (grown.T @ space), space, rtol=0, atol=1e-4)


def test_what_a_task_adds_to_eps_and_whose_model_is_sketched(monkeypatch):
    seen, plain = [], FOT.sketched

    def noted(self, client, net, bases, data):
        seen.append((client.id, {name: p.clone() for name, p in net.named_parameters()}))
        return plain(self, client, net, bases, data)

    monkeypatch.setattr(FOT, "sketched", noted)
    one, made = (ran(FOT(eps=0.9, eps_inc=0.02), EQUAL, rounds=rounds) for rounds in (1, 2))
    assert made.server.eps == pytest.approx(0.92) and one.server.eps == 0.9 and made.server.protected == 1
    assert [k for k, _ in seen] == [0, 1, 2, 3]
    model = one.server.model
    for k, params in seen:
        delta = FOT().local(node(made.site, k, round=2), model, None)["delta"]
        for name, value in params.items():
            torch.testing.assert_close(value, (model + delta)[name])
            assert not torch.equal(value, model[name])
