"""On an accelerator: no tensor elsewhere, no waiting inside a client's loop, the results of the processor.

`pytest tests/on_device.py --device cuda`; without CUDA a device stands in for it that refuses what CUDA refuses, and
counts what CUDA would wait for. `test_device.py` runs this in processes of its own: after it no worker can be forked.
"""

import dataclasses

import pytest
import torch
from pretend import device, library, unwaited

from fedloom import message, nets, testing
from fedloom.boundary.privacy.sample_level import Guard
from fedloom.data import augment
from fedloom.descent import Descent
from fedloom.encoders import Features
from fedloom.encoding import same
from fedloom.engines import auto, build
from fedloom.engines.gather import Gather, Parked
from fedloom.engines.serial import Serial
from fedloom.message import Packed, Sparse
from fedloom.method import Method
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Client
from fedloom.optimizers import SGD
from fedloom.random import stream
from fedloom.registry import catalogue
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.task import Data
from fedloom.tasks.toy import Toy
from fedloom.testing import NEARLY, Lab, difference, trace
from fedloom.vector import Vector
from fedloom.world import World

METHODS = catalogue()
LABS: dict[tuple[str, str], Lab] = {}  # one method's, whose checks share runs
FEW = ("scaffold",)  # methods that go through the whole contract on the device that stands in: they stand for all


@pytest.fixture
def there(request):
    name = device(request.config.getoption("--device"))
    entry = request.node.callspec.params.get("entry") if hasattr(request.node, "callspec") else None
    if name == "pretend" and entry and "graph" in entry.load(Method).needs:
        pytest.skip("pretend has no sparse tensors")
    return name


def client(place, k=1):
    """A client and, on its device, a point near the initial one."""
    node = Client(Site(Toy(), 0, place), k, {})
    w = node.initial
    return node, Vector(w.flat + 0.1 * torch.randn(len(w), generator=stream(0, "test")).to(w.flat), w.layout)


def nearly(found, expected):
    return torch.allclose(found.flat.cpu(), expected.flat.cpu(), rtol=NEARLY, atol=NEARLY)


def proximal(w):
    return lambda at: 0.1 * (at - w).params


def own_loss(net, batch):
    return torch.nn.functional.multi_margin_loss(net(batch.x), batch.y)


OPTIONS = {
    "plain": lambda node, w: {},
    "epochs": lambda node, w: {"epochs": 3},
    "steps": lambda node, w: {"steps": 5},
    "full batches": lambda node, w: {"batch": None, "steps": 3},
    "momentum": lambda node, w: {"momentum": 0.9},
    "weight decay": lambda node, w: {"weight_decay": 0.01},
    "clip": lambda node, w: {"clip": 0.5},
    "corrected": lambda node, w: {"correct": 0.1 * w.params},
    "proximal": lambda node, w: {"correct": proximal(w), "momentum": 0.5, "clip": 1.0},
    "head only": lambda node, w: {"only": "head.*"},
    "own loss": lambda node, w: {"loss": own_loss},
    "own data": lambda node, w: {"data": Data(*node.data.all())},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_descent_waits_for_nothing_and_comes_where_it_comes_on_the_processor(there, option):
    ends = []
    for place in (there, "cpu"):
        node, w = client(place)
        chosen = {"lr": 0.1, "batch": 4} | OPTIONS[option](node, w)
        if place == "cpu":
            ends.append(node.descend(w, **chosen))
        else:
            with unwaited(there):
                ends.append(node.descend(w, **chosen))
            assert ends[0][0].flat.device.type == there
    assert nearly(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert not nearly(ends[0][0], w)


@pytest.mark.parametrize("only", [None, "body.*"])
def test_a_gradient_waits_for_nothing(there, only):
    found = []
    for place in (there, "cpu"):
        node, w = client(place)
        batch = node.data.all()
        if place == "cpu":
            found.append(node.grad(w, batch, only=only))
        else:
            with unwaited(there):
                found.append(node.grad(w, batch, only=only))
    assert nearly(*found)


@pytest.mark.parametrize("option", ["plain", "momentum", "clip", "corrected", "proximal", "head only"])
def test_clients_of_a_batch_wait_for_nothing(there, option):
    site = Site(Toy((9, 14, 20)), 0, there)
    parked, alone = [], []
    for k in range(3):
        node = Client(site, k, {})
        w = node.initial * (1 + 0.1 * k)
        given = {"lr": 0.1, "batch": 4} | OPTIONS[option](node, w)
        names = [field.name for field in dataclasses.fields(Descent)][1:]
        rest = {name: given.get(name, 0.0 if name == "weight_decay" else None) for name in names}
        rest["optimizer"] = SGD(given.get("momentum", 0.0))
        job = Descent(w, **rest | {"loss": site.task.loss})
        parked.append(Parked(node, job))
        alone.append(Parked(Client(site, k, {}), job).alone())
    with unwaited(there):
        together = Gather(site).batched(parked)
    assert together is not None
    assert all(nearly(one[0], other[0]) for one, other in zip(together, alone, strict=True))


def test_noised_gradients_of_samples_wait_for_nothing(there):
    pytest.importorskip("opacus", reason="Opacus is not installed")
    node, w = client(there)
    node.guard = Guard(1.0, 1.0)
    node.descend(w, lr=0.1, batch=4)  # the loss is looked at once
    with unwaited(there):
        moved, _ = node.descend(w, lr=0.1, batch=4)
    assert moved.flat.isfinite().all()


@pytest.mark.parametrize("x", [torch.zeros(5, 3, 12, 12), torch.zeros(5, 6)], ids=["images", "numbers"])
def test_views_of_a_batch_wait_for_nothing(there, x):
    x, draw = x.to(there), stream(0, "test")
    with unwaited(there):
        views = [augment.weak(x, draw), augment.strong(x, draw)]
    assert all(view.device == x.device and view.shape == x.shape for view in views)


@pytest.mark.parametrize(("name", "shape"), [("mlp:8", (6,)), ("cnn", (1, 28, 28)), ("resnet18", (3, 16, 16))])
def test_networks_train_there(there, name, shape):
    torch.manual_seed(0)  # noqa: TID251 - weights
    net = nets.build(name, shape, 3).to(there)
    loss = torch.nn.functional.cross_entropy(net(torch.ones(2, *shape, device=there)), torch.tensor([0, 2]).to(there))
    assert all(g.device.type == there for g in torch.autograd.grad(loss, list(net.parameters())))


class Counting(Serial):
    """Counts how often clients' training makes the device be waited for."""

    waits = 0

    def run(self, call, clients):
        for k in clients:
            before = library().waits_so_far()
            outcomes = list(super().run(call, [k]))
            if call.kind == "train":
                self.waits += library().waits_so_far() - before
            yield from outcomes


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_clients_of_no_method_wait_more_often_the_more_steps_they_take(there, entry):
    if there == "cuda":
        pytest.skip("CUDA does not count what waits for it")
    lab = Lab(entry.load(Method), there)
    few, many = Counting(), Counting()
    rounds = 3 if any(need.startswith("stream") for need in lab.cls.needs) else 2  # a second task comes with the third
    for sizes, engine in (((20, 20), few), ((60, 60), many)):
        lab.experiment(lab.toy(sizes=sizes), engine, rounds=rounds, eval_every=rounds)  # what counts are the rounds
    assert few.waits == many.waits


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_every_method_gives_the_same_bits_over_a_wire_and_nearly_those_of_the_processor(there, entry):
    lab = Lab(entry.load(Method), there)
    testing.check_loopback(lab)
    if not lab.method.rough:
        found = [one.serial["server"] for one in (lab, Lab(lab.cls))]
        assert difference(*(message.moved(values, torch.device("cpu")) for values in found), nearly=1e-3) is None


def test_every_kind_of_value_is_moved_whole(there):
    layout = Site(Toy(), 0).initial.layout
    sent = {
        "few": Sparse(torch.tensor([1, 4]), torch.ones(2, 3), 9),
        "codes": Packed(torch.arange(5), 3),
        "nested": [(torch.ones(2), {"model": Vector(torch.ones(layout.size), layout, readonly=True)})],
    }
    moved = message.moved(sent, torch.device(there))
    tensor, vector = moved["nested"][0][0], moved["nested"][0][1]["model"]
    for part in (moved["few"].index, moved["few"].values, moved["codes"].values, tensor, vector.flat):
        assert part.device.type == there
    assert vector.readonly and same(moved, sent)


def pytest_generate_tests(metafunc):
    if metafunc.function is test_contract:
        stands_in = metafunc.config.getoption("--device") == "pretend"
        chosen = [entry for entry in METHODS if not stands_in or entry.name in FEW]
        metafunc.parametrize("check", testing.CHECKS, ids=testing.title)
        metafunc.parametrize("entry", chosen, ids=lambda entry: entry.name)


def test_contract(there, entry, check):
    if (entry.name, there) not in LABS:
        LABS.clear()
        LABS[entry.name, there] = Lab(entry.load(Method), there)
    check(LABS[entry.name, there])


SETTINGS = [
    *({"compress": text} for text in ("topk:0.2", "randk:0.2+qsgd:4", "sign", "lowrank:2", "topk:0.5+fp16")),
    *({"aggregate": rule} for rule in ("median", "trimmed_mean:1", "krum:f=1", "bulyan:f=0", "geometric_median")),
    *({"attack": text} for text in ("label_flip:0.5", "gaussian:0.5", "sign_flip:0.5", "alie:0.5", "backdoor:0.5")),
    *({"dp": text} for text in ("client:noise=1,clip=adaptive", "sample:noise=1", "local:laplace,epsilon=5")),
    *({"channel": text} for text in ("awgn:20", "air:20")),
    {"secure": "bonawitz"},
    {"faults": "nan:0.5"},
    {"cache": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, *s.items())))
def test_what_lies_between_clients_and_server_works(there, settings):
    lab = Lab(FedAvg, there)
    task = Toy((12, 8, 14, 10, 9, 11))
    here = trace(lab.experiment(task, rounds=2, **settings))
    wired = trace(lab.experiment(task, build("loopback"), rounds=2, **settings))
    assert difference(here, wired) is None
    assert here["server"]["model"].flat.device.type == there


@pytest.mark.parametrize("entry", [entry for entry in METHODS if entry.name in ("fedau", "fedkseed", "fot")])
def test_a_run_goes_on_from_a_checkpoint_on_a_device(there, entry, tmp_path):
    testing.check_resume(Lab(entry.load(Method), there))


def test_auto_speaks_of_the_device(there):
    site, method = Site(Toy(), 0, there), FedAvg()
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "device": there})
    chosen = auto.choose(method, site, World.of(spec, site.task.population), 0, 4)
    assert chosen.engine != "pool"
    assert there in chosen.why


def test_networks_that_are_frozen_in_front_follow_what_they_are_given(there):
    x = torch.rand(5, 1, 8, 8, generator=stream(0, "test"))
    plain = Features("random:4", (1, 8, 8), "", torch.rand(16, generator=stream(1, "test")), torch.full((16,), 2.0))
    found = plain.to(torch.device(there))(x.to(there))
    assert found.device.type == torch.device(there).type and plain(x).device.type == "cpu"
    assert torch.allclose(found.cpu(), plain(x), rtol=NEARLY, atol=NEARLY)
