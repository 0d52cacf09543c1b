"""Several networks under one loss, and networks of a method's own, against plain PyTorch."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from test_vectorized import RAGGED, agrees
from torch import nn
from torch.nn import functional as F

from fedloom.engines.pool import Pool
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.node import Client
from fedloom.optimizers import Adam
from fedloom.site import Site
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace
from fedloom.vector import Vector


class Normed(nn.Module):
    """A small network with BatchNorm."""

    def __init__(self, width, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.body(x))


def mixed(nets, batch):
    """A gate that weighs the outputs of two experts."""
    shares = nets["gate"](batch.x).softmax(1)
    outputs = torch.stack([nets[name](batch.x).softmax(1) for name in ("one", "two")], 1)
    return F.nll_loss((shares[:, :, None] * outputs).sum(1).log(), batch.y)


def known(site, norm=False):
    me = Client(site, 0, {})
    one = me.network(Normed, 6, 3) if norm else site.initial
    return me, {"gate": me.network(nn.Linear, 6, 2), "one": one, "two": one + 0.1}


def by_hand(me, nets):
    found = {name: copy.deepcopy(me.net(w)).requires_grad_(True).train() for name, w in nets.items()}
    return found, lambda: {name: Vector.of(net, nets[name].layout) for name, net in found.items()}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "how",
    [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"clip": 0.1}, {"only": ("gate.*", "two.head.*")}, {"correct": True}],
    ids=str,
)
def test_networks_descend_together_as_one_module_of_torch(norm, how):
    site = Site(Toy((22,)), 0)
    me, nets = known(site, norm)
    pull = {name: (w.params * 0.0 + k) for k, (name, w) in enumerate(reversed(nets.items()))}  # in another order
    rest = dict(how) | ({"correct": pull} if "correct" in how else {})
    reached, steps = me.descend(nets, 0.2, epochs=2, batch=6, loss=mixed, **rest)

    torchs, vectors = by_hand(me, nets)
    params = {f"{name}.{n}": p for name, net in torchs.items() for n, p in net.named_parameters()}
    moving = [p for name, p in params.items() if "only" not in how or name.startswith(("gate.", "two.head."))]
    rule = torch.optim.SGD(moving, 0.2, momentum=how.get("momentum", 0), weight_decay=how.get("weight_decay", 0))
    for batch in Client(site, 0, {}).batches(6, epochs=2):
        for p in params.values():
            p.grad = None
        mixed(torchs, batch).backward()
        if "clip" in how:
            nn.utils.clip_grad_norm_(moving, how["clip"])
        if "correct" in how:
            for name, p in params.items():
                p.grad += list(reversed(nets)).index(name.partition(".")[0])
        rule.step()
    assert steps == 8 == me.steps and me.samples == 44 and list(reached) == ["gate", "one", "two"]
    for name, w in vectors().items():
        assert reached[name].layout == nets[name].layout
        torch.testing.assert_close(reached[name].flat, w.flat, rtol=1e-4, atol=2e-6)


def test_a_correction_may_be_a_function_of_all_vectors():
    me, nets = known(Site(Toy((22,)), 0))
    how = {"epochs": 2, "batch": 6, "loss": mixed}
    one = me.descend(nets, 0.1, correct=lambda ws: {name: 0.2 * (w - nets[name]) for name, w in ws.items()}, **how)[0]
    other = Client(me.site, 0, {})
    w = dict(nets)
    for batch in other.batches(6, epochs=2):
        g = other.grad(w, batch, mixed)
        w = {name: w[name] - 0.1 * (g[name] + 0.2 * (w[name] - nets[name])) for name in w}
    for name in nets:
        torch.testing.assert_close(one[name].flat, w[name].flat, rtol=1e-4, atol=1e-6)


def test_gradients_come_by_name_and_move_the_statistics_of_ones_own_vectors_only():
    me, nets = known(Site(Toy((22,)), 0), norm=True)
    batch = me.data.all()
    mine = {name: w.clone() for name, w in nets.items()}
    mine["two"].readonly = True
    found = me.grad(mine, batch, mixed, only="one.*")
    torchs, vectors = by_hand(me, nets)
    mixed(torchs, batch).backward()
    moved = vectors()
    for name, p in torchs["one"].named_parameters():
        torch.testing.assert_close(found["one"][name], p.grad)
    assert not found["gate"].flat.any() and not found["two"].flat.any()
    torch.testing.assert_close(mine["one"].flat, moved["one"].flat)
    assert not torch.equal(mine["one"].flat, nets["one"].flat) and torch.equal(mine["two"].flat, nets["two"].flat)


def test_statistics_at_home_are_those_of_each_network():
    def loss(nets, batch):
        return F.cross_entropy(nets["small"](batch.x), batch.y) + nets["wide"](batch.x).square().mean()

    task, state, reached = Toy((22,)), {}, {}
    for buffers in ("average", "local"):
        site = Site(task, 0, buffers=buffers)
        reached[buffers] = {"small": site.network(Normed, 6, 3), "wide": site.network(Normed, 6, 4)}
        for nth in range(2):
            me = Client(site, 0, state, nth=nth)
            reached[buffers], _ = me.descend(reached[buffers], 0.1, epochs=1, batch=6, loss=loss)
            state = me.state.values_
    for name, w in reached["local"].items():
        travelled = reached["average"][name]
        assert torch.equal(w.params.flat, travelled.params.flat)
        assert torch.equal(w.buffers.flat, site.network(Normed, 6, 3 + (name == "wide")).buffers.flat)
        assert torch.equal(Vector.of(me.net(w), w.layout).flat, travelled.flat), "what does not leave stays here"


@dataclass(frozen=True)
class Mixture(Method):
    """Two experts and a gate, averaged."""

    lr: float = 0.1
    private: ClassVar = ("gate", "one", "two")

    def networks(self, site):
        return {"gate": site.network(nn.Linear, *site.task.shape, 2), "two": site.network("mlp:8", 1)}

    def setup(self, server, clients):
        server.gate, server.two = server.nets["gate"], server.nets["two"]

    def round(self, server, cohort):
        up = cohort.mean(self.local, gate=server.gate, one=server.model, two=server.two)
        server.gate, server.model, server.two = server.gate + up.gate, server.model + up.one, server.two + up.two

    @client
    def local(self, client, **nets):
        reached, _ = client.descend(nets, self.lr, epochs=2, batch=7, loss=mixed, optimizer=Adam())
        reached = client.descend(reached, self.lr, epochs=1, batch=4, loss=mixed, clip=0.5, only="gate.*")[0]
        for batch in client.batches(8, steps=2):
            slope = client.grad(reached, batch, mixed)
            reached = {name: w - self.lr * slope[name] for name, w in reached.items()}
        return {name: w - nets[name] for name, w in reached.items()}


def test_many_clients_together_as_each_alone():
    agrees(Lab(Mixture), Toy(RAGGED))
    agrees(Lab(Mixture), Toy(RAGGED), Pool(2, together=True), lost=0.2)


class Scaled(nn.Module):
    """As many numbers as nn.Linear(6, 3), of which the last scale and shift nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 6), 0.1))
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x @ self.weight.T * self.factor


@dataclass(frozen=True)
class TwoKinds(Method):
    """Every other client has another network, as long as the others'."""

    lr: float = 0.5

    def networks(self, site):
        return {"plain": site.network(nn.Linear, 6, 3), "scaled": site.network(Scaled)}

    def setup(self, server, clients):
        server.plain, server.scaled = server.nets["plain"], server.nets["scaled"]

    def round(self, server, cohort):
        for reply in cohort.call(self.local, plain=server.plain, scaled=server.scaled):
            if reply.client % 2:
                server.scaled = server.scaled + 0.2 * reply.delta
            else:
                server.plain = server.plain + 0.2 * reply.delta

    @client
    def local(self, client, plain, scaled):
        start = scaled if client.id % 2 else plain
        w, _ = client.descend(start, self.lr, epochs=2, batch=5)
        slope = client.grad(w, client.data.all())
        return {"delta": w - 0.1 * slope - start}


def test_clients_with_other_networks_train_apart_from_each_other():
    agrees(Lab(TwoKinds), Toy((10, 10, 10, 10, 10)))


def test_together_they_are_one_batch(monkeypatch):
    from fedloom.engines import gather

    monkeypatch.setattr(gather.Parked, "alone", lambda parked: pytest.fail("a descent was taken alone"))
    from fedloom.engines.vectorized import Vectorized

    trace(Lab(Mixture).experiment(Toy((8, 8, 8)), Vectorized()))


def test_other_processes_know_the_networks():
    lab = Lab(Mixture)
    whole = trace(lab.experiment(Toy(RAGGED)))
    pool = trace(lab.experiment(Toy(RAGGED), Pool(2)))
    assert difference(whole["server"], pool["server"]) is None


@pytest.mark.parametrize("dp", ["sample:noise=1.0,clip=1.0", "client:noise=1.0,clip=0.5", "local:epsilon=1.0,clip=0.5"])
def test_privacy_holds_for_descents_of_several_networks(dp):
    """A method that takes single gradients beside its descents is refused; without these it is noised and accounted."""

    @dataclass(frozen=True)
    class Descending(Mixture):
        @client
        def local(self, client, **nets):
            reached, _ = client.descend(nets, self.lr, epochs=1, batch=7, loss=mixed)
            return {name: w - nets[name] for name, w in reached.items()}

    runs = [trace(Lab(Descending).experiment(Toy((20, 20)), dp=setting)) for setting in (None, dp)]
    for name in ("gate", "model", "two"):
        plain, noised = (run["server"][name].flat for run in runs)
        assert not torch.allclose(plain, noised, atol=1e-2), name


def test_what_does_not_fit_is_told():
    me, nets = known(Site(Toy((22,)), 0))
    with pytest.raises(
        UsageError, match=r"gate, one, two descend on a loss of all of them: give loss=f\(nets, batch\)"
    ):
        me.descend(nets, 0.1)
    with pytest.raises(UsageError, match=r"'gate.one' cannot be one"):
        me.descend({"gate.one": nets["gate"]}, 0.1, loss=mixed)
    with pytest.raises(UsageError, match="'keys' cannot be one"):
        me.descend({"keys": nets["gate"]}, 0.1, loss=mixed)
    with pytest.raises(UsageError, match="a vector for each of gate, one, two, got gate"):
        me.descend(nets, 0.1, loss=mixed, correct={"gate": nets["gate"]})
    with pytest.raises(UsageError, match="this network has the layout"):
        me.descend(nets, 0.1, loss=mixed, correct=nets | {"gate": nets["one"]})
    with pytest.raises(UsageError, match=r"unknown part of a model 'gat\.\*'"):
        me.descend(nets, 0.1, loss=mixed, only="gat.*")


# networks made from the task's own


class Wide(nn.Module):
    def __init__(self, net, extra):
        super().__init__()
        self.net = net
        self.extra = nn.Linear(net.head.in_features, extra)

    def forward(self, x):
        return torch.cat([self.net(x), self.extra(self.net.body(x))], 1)


def frozen(net):
    net.body.requires_grad_(False)
    return net


def test_a_derived_network_begins_with_the_tasks_weights_wherever_and_whenever_it_is_made():
    site, later = Site(Toy((22,)), 0), Site(Toy((22,)), 0)
    me, other = Client(site, 0, {}), Client(later, 0, {})
    other.descend(later.initial, 0.5, epochs=3, only="head.*")  # the bench holds other weights, and a choice of them
    wide = [one.derive(Wide, 2) for one in (me, other)]
    assert torch.equal(wide[0].flat, wide[1].flat) and me.derive(Wide, 2) is wide[0]
    for name in site.initial:
        assert torch.equal(wide[0][f"net.{name}"], site.initial[name])
    assert me.scores(wide[0], me.data.x).shape == (22, 5)
    torch.testing.assert_close(me.scores(wide[0], me.data.x)[:, :3], me.scores(site.initial, me.data.x))
    w, _ = me.descend(wide[0], 0.1, epochs=1)
    assert not torch.equal(w.flat, wide[0].flat) and torch.equal(me.derive(Wide, 2).flat, wide[1].flat)
    assert len(me.derive(Wide, 3)) > len(wide[0])


def test_what_is_frozen_in_a_derived_network_is_no_part_of_its_vector():
    me = Client(Site(Toy((22,)), 0), 0, {})
    head = me.derive(frozen)
    assert set(head) == {"head.weight", "head.bias"}
    w, _ = me.descend(head, 0.1, epochs=1, batch=5)
    whole, _ = Client(me.site, 0, {}).descend(me.initial, 0.1, epochs=1, batch=5, only="head.*")
    torch.testing.assert_close(w.flat, whole.select("head.*").flat)
    assert set(me.initial) == {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}, (
        "the task's own is as it was"
    )
    assert me.descend(me.initial, 0.1, steps=1)[0]["body.0.weight"].ne(me.initial["body.0.weight"]).any()


def test_other_arguments_give_a_network_of_the_tasks_names_other_weights():
    me = Client(Site(Toy((22,)), 0), 0, {})
    one, two, again = me.network("mlp:8", 1), me.network("mlp:8", 2), me.network("mlp:8", 1)
    assert one.layout == two.layout and not torch.equal(one.flat, two.flat) and again is one
