"""Clients that train as one batch: the same results to rounding, and one by one where there is no batched form."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedloom.calls import Call
from fedloom.engines import build
from fedloom.engines.gather import Gather
from fedloom.engines.pool import Pool
from fedloom.engines.vectorized import Vectorized, at_once
from fedloom.method import Method, client
from fedloom.methods.continual.target import TARGET
from fedloom.methods.heterogeneous.fedconv import FedConv
from fedloom.methods.heterogeneous.fedmd import FedMD
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.registry import catalogue
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.task import Data
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace

NEARLY = 1e-5
RAGGED = (3, 40, 5, 17, 6, 29, 8, 9, 33, 11, 12)


def agrees(lab, task=None, engine=None, **settings):
    engine = engine or Vectorized()
    serial, together = (trace(lab.experiment(task, made, **settings)) for made in (None, engine))
    for part in () if lab.cls.rough else ("server", "states", "metrics"):
        assert difference(serial[part], together[part], part, NEARLY) is None
    assert difference(serial["ledger"], together["ledger"]) is None


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
def test_every_method_agrees_with_serial(entry):
    lab = Lab(entry.load(Method))
    world = {setting: 0.2 for setting in ("dropout", "lost") if setting not in lab.cls.refuses}
    agrees(lab, lab.toy(sizes=RAGGED), **world)


def descended(groups, lr, betas=None):
    """Plain gradient descent where Adam is asked for."""
    return torch.optim.SGD(groups, lr)


def squares(net, batch):
    """The mean square where a distance is asked for."""
    return F.mse_loss(net(batch.x), batch.y)


@pytest.mark.parametrize(
    ("cls", "place", "smooth"),
    [
        (FedConv, "torch.optim.Adam", descended),
        (FedMD, "fedloom.methods.heterogeneous.fedmd.disagreement", squares),
        (TARGET, "torch.optim.Adam", descended),
    ],
    ids=["fedconv", "fedmd", "target"],
)
def test_nothing_is_rough_but_what_is_said_to_be(cls, place, smooth, monkeypatch):
    monkeypatch.setattr(cls, "rough", False)
    monkeypatch.setattr(place, smooth)
    lab = Lab(cls)
    agrees(lab, lab.toy(sizes=RAGGED), dropout=0.2, lost=0.2)


def test_inside_the_workers_of_a_pool_it_agrees_too():
    agrees(Lab(Scaffold), Toy(RAGGED), Pool(2, together=True), dropout=0.2, lost=0.2)
    assert build("vectorized", 2).together


@dataclass(frozen=True)
class Thorough(FedAvg):
    """Every argument of descend at once, and an open loop over gradients."""

    @client
    def local(self, client, model):
        pull = 0.1 * model.params
        w, _ = client.descend(model, 0.1, epochs=2, batch=7, momentum=0.9, weight_decay=0.01, clip=0.5, correct=pull)
        w, _ = client.descend(w, 0.1, steps=5, batch=4, only="head.*", correct=lambda v: 0.3 * (v - model))
        for batch in client.batches(batch=6, steps=3):
            w = w - 0.1 * client.grad(w, batch, loss=squared)
        return {"delta": w - model, "n": client.n}


def squared(net, batch):
    return F.mse_loss(net(batch.x).softmax(1), F.one_hot(batch.y, 3).float())


def test_every_kind_of_descent_agrees():
    agrees(Lab(Thorough), Toy(RAGGED))


@dataclass(frozen=True)
class Varied(FedAvg):
    """Clients that differ in one argument of descend each, which draw in between and tell what they were metered."""

    @client
    def local(self, client, model):
        kinds = [
            {},
            {"lr": 0.02},
            {"momentum": 0.9},
            {"weight_decay": 0.3},
            {"clip": 0.05},
            {"only": "head.*"},
            {"correct": 0.1 * model.params},
            {"correct": lambda v: 0.3 * (v - model)},
            {"loss": squared},
            {"data": Data(client.data.x[::2], client.data.y[::2])},
        ]
        how = {"lr": 0.1, "batch": 7, "epochs": 2} | kinds[client.id % len(kinds)]
        w, _ = client.descend(model, **how)
        w = w + 0.1 * torch.rand(())
        w, _ = client.descend(w, **how)
        client.log(samples=client.samples, steps=client.steps)
        return {"delta": w - model + 0.1 * torch.rand(()), "n": client.n}


class Apart(Toy):
    """Every client's data are tensors of its own."""

    def data(self, client, split):
        data = super().data(client, split)
        return Data(data.x.clone(), data.y.clone()) if split == "train" else data


@pytest.mark.parametrize("task", [Toy, Apart])
def test_only_jobs_of_one_kind_are_done_together(task):
    agrees(Lab(Varied), task(RAGGED * 2))


def test_a_cohort_larger_than_a_batch_of_clients_is_served_in_several(monkeypatch):
    monkeypatch.setattr("fedloom.engines.vectorized.at_once", lambda site: 4)
    agrees(Lab(Scaffold), Toy(RAGGED))


@pytest.mark.parametrize(("numbers", "clients"), [(83, 512), (2**20, 64), (2**30, 1)])
def test_a_batch_of_clients_has_at_most_256_mib_of_models(numbers, clients):
    site = SimpleNamespace(bench=SimpleNamespace(layout=SimpleNamespace(size=numbers)))
    assert at_once(site) == clients


def test_it_really_trains_together(monkeypatch):
    sizes = []
    batched = Gather.batched
    monkeypatch.setattr(Gather, "batched", lambda self, group: sizes.append(len(group)) or batched(self, group))
    steps = []
    monkeypatch.setattr("fedloom.engines.gather.Parked.alone", lambda *_: steps.append(1))
    made = Lab(FedAvg).experiment(Toy(RAGGED), Vectorized(), rounds=2)
    assert made.site.gather is None, "nobody waits for the others where one client works"
    assert sizes == [len(RAGGED)] * 2
    assert not steps


@dataclass(frozen=True)
class Moved(FedAvg):
    """A loss of its own, the same function in every round, that looks at something else in each."""

    pull: ClassVar[list[float]] = [0.0]

    @client
    def local(self, client, model):
        self.pull[0] = float(client.round)
        w, _ = client.descend(model, lr=self.lr, steps=40, batch=4, loss=self.pulled)
        return {"delta": w - model, "n": client.n}

    def pulled(self, net, batch):
        return F.cross_entropy(net(batch.x), batch.y) + self.pull[0] * net.head.weight.square().sum()


def test_a_loss_may_change_between_rounds():
    agrees(Lab(Moved), Toy((12,) * 5), rounds=3)


@dataclass(frozen=True)
class Long(FedAvg):
    epochs: int = 20


def test_many_equal_steps_are_taken_from_a_trace_and_agree_too():
    engine = Vectorized()
    agrees(Lab(Long), Toy((12,) * 5), engine, rounds=3)
    (slope,) = engine.gather.slopes.values()
    assert any(slope.traces.values())


@dataclass(frozen=True)
class Unbatched(FedAvg):
    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=self.batch, loss=branching)
        return {"delta": w - model, "n": client.n}


def branching(net, batch):
    loss = F.cross_entropy(net(batch.x), batch.y)
    return 2 * loss if loss.item() > 1 else loss  # looks at a number, which a batch of clients does not have


@pytest.mark.parametrize("layer", [None, nn.Dropout(0.5), nn.BatchNorm1d(8)], ids=str)
def test_what_has_no_batched_form_is_done_one_by_one_with_the_bits_of_serial(layer):
    class Odd(Toy):
        def network(self):
            net = super().network()
            if layer is not None:
                net.body.append(copy.deepcopy(layer))
            return net

    lab = Lab(Unbatched if layer is None else FedAvg)
    serial, together = (trace(lab.experiment(Odd(), engine)) for engine in (None, Vectorized()))
    assert difference(serial, together) is None


@dataclass(frozen=True)
class Failing(FedAvg):
    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        if client.id == 2:
            raise ZeroDivisionError("nothing to divide")
        return {"delta": w - model, "n": client.n}


def test_an_exception_names_its_client_and_leaves_the_site_usable():
    lab = Lab(Failing)
    with pytest.raises(RuntimeError, match=r"client 2, round 1, test_vectorized\.local: ZeroDivisionError"):
        lab.experiment(engine=Vectorized())
    before = torch.default_generator.get_state()
    Lab(FedAvg).experiment(engine=Vectorized())
    assert torch.equal(before, torch.default_generator.get_state())


def test_who_trained_together_leaves_the_generator_where_it_stood():
    engine, site = Vectorized(), Site(Toy(), 0)
    method = FedAvg(batch=10)
    engine.start(method, site, {})
    before = torch.default_generator.get_state()
    call = Call("call", "local", (0, 1, 2), {"model": site.initial}, {}, "train", 1, 0)
    assert [outcome.client for outcome in engine.run(call, call.clients)] == [0, 1, 2]
    assert torch.equal(before, torch.default_generator.get_state())


def test_auto_says_what_it_chose_and_why():
    task = Toy((12,) * 30)
    spec = Spec.of({"method": "fedavg", "partition": "given", "rounds": 1, "engine": "auto"})
    made = Experiment(spec, task).begin(None)
    made.go()
    assert made.spec.engine in ("serial", "pool", "vectorized")
    assert made.record.spec.engine == made.spec.engine, "the spec repeats the run with the engine that was chosen"
    assert made.record.manifest["engine"].startswith(f"{made.spec.engine}: a step takes ")
