"""Networks of users: any `nn.Module` trains, with a head that is found or named, and comes out as it went in."""

import copy
import importlib
import os
import re
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedloom
from fedloom import user_networks
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.nets import build
from fedloom.nets.own import Headed, bare, fitted, outward
from fedloom.testing.lab import encoding

SETTINGS = {"partition": "iid", "clients": 3, "rounds": 2}
FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(144, num_classes)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1)))
"""


def row(*last):
    """The layers of the library's `mlp:16` for digits, in a row, in the order in which it draws them."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10), *last)


class Soft(nn.Module):
    """Has a log-softmax behind its last layer."""

    def __init__(self):
        super().__init__()
        self.net = row()

    def forward(self, x):
        return self.net(x).log_softmax(1)


class Deep(nn.Module):
    """Has a head of two layers, and runs its parts in another order than it makes them."""

    def __init__(self):
        super().__init__()
        self.top = nn.ModuleDict({"out": nn.Sequential(nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))})
        self.low = nn.Linear(64, 16)

    def forward(self, x):
        return self.top["out"](self.low(x.flatten(1)))


class Late(nn.Module):
    """Drops out behind its last layer, which shows in training alone."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = row(), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.net(x))


class Tied(nn.Module):
    """The head's weights are those of a layer before."""

    def __init__(self):
        super().__init__()
        self.low, self.middle, self.fc = nn.Linear(64, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.fc.weight = self.middle.weight

    def forward(self, x):
        return self.fc(self.middle(self.low(x.flatten(1))))


class Twice(nn.Module):
    """Runs its last layer twice."""

    def __init__(self):
        super().__init__()
        self.low, self.fc = nn.Linear(64, 10), nn.Linear(10, 10)

    def forward(self, x):
        return self.fc(self.fc(self.low(x.flatten(1))))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file with the class Net, in the working folder; nothing is known of it yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_networks, "GIVEN", {})
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return path


def same(one, other):
    names = {"seconds", "eval_seconds"}
    mine, its = ([{k: v for k, v in row.items() if k not in names} for row in run.metrics] for run in (one, other))
    assert mine == its
    if one.final.get("global_test_accuracy") is not None:
        assert encoding.same(one.model.flat, other.model.flat)


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedrep", "fedproto", "moon", "fedgen", "ccvr"])
@pytest.mark.parametrize("head", [None, "3"])
def test_a_module_is_what_the_library_would_train(method, head):
    library = fedloom.run(method, "digits", model="mlp:16", **SETTINGS)
    own = fedloom.run(method, "digits", model=row, head=head, **SETTINGS)
    mine, its = ([{k: v for k, v in r.items() if "seconds" not in k} for r in run.metrics] for run in (library, own))
    for one, other in zip(mine, its, strict=True):
        for name in one.keys() & other.keys():
            if not name.endswith("bytes"):  # names of entries are shorter, and sent
                assert one[name] == other[name], name


def test_a_class_is_drawn_by_the_seed_and_a_module_is_taken_as_it_is():
    one, other = (fedloom.run("fedavg", "digits", model=row, seed=seed, **SETTINGS) for seed in (0, 1))
    assert not torch.equal(one.model.flat, other.model.flat)
    net = row()
    before = copy.deepcopy(net.state_dict())
    tasks = [fedloom.problem("digits", model=net, seed=seed, partition="iid", clients=3) for seed in (0, 1)]
    for task in tasks:
        assert all(torch.equal(bare(task.network()).state_dict()[name], value) for name, value in before.items())
    fedloom.run("fedavg", "digits", model=net, **SETTINGS)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        net[1].weight.zero_()  # the run of before has its own copy
    assert torch.equal(bare(tasks[0].network()).state_dict()["1.weight"], before["1.weight"])


def test_two_functions_of_one_name_stay_two():
    def of(width):
        net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))  # noqa: E731 - no `def`
        return fedloom.problem("digits", model=net, partition="iid", clients=3)

    narrow, wide = of(3), of(5)
    assert narrow.model != wide.model
    assert [task.network()(torch.zeros(1, 1, 8, 8)).shape for task in (narrow, wide)] == [(1, 10)] * 2
    assert [bare(task.network())[1].out_features for task in (narrow, wide)] == [3, 5]


def test_what_comes_out_is_what_went_in(tmp_path):
    net = Deep()
    run = fedloom.run("ditto", "digits", model=net, head="top.out", out=tmp_path / "run", report=False, **SETTINGS)
    for trained in (run.module(), run.module("last"), run.client_module(1)):
        assert type(trained) is Deep and list(trained.state_dict()) == list(net.state_dict())
    weights = load_file(tmp_path / "run" / "model" / "last.safetensors")
    assert set(weights) == set(net.state_dict())
    plain = Deep()
    plain.load_state_dict(weights)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(plain.eval()(x), run.module("last")(x))
    assert torch.equal(run.module("last", into=Deep())(x), run.module("last")(x))
    assert set(run.model) == set(net.state_dict())
    again = fedloom.load(tmp_path / "run")
    with pytest.raises(UsageError, match=r"give one of the same form .*into=MyNetwork"):
        again.module()
    assert torch.equal(again.client_module(1, into=Deep())(x), run.client_module(1)(x))


def test_initial_weights_have_the_names_of_the_module(tmp_path):
    net = row()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    of_file = fedloom.run("fedrep", "digits", model=row, init=tmp_path / "net.safetensors", **SETTINGS)
    same(of_file, fedloom.run("fedrep", "digits", model=net, **SETTINGS))
    save_file(Deep().state_dict(), tmp_path / "deep.safetensors")
    with pytest.raises(UsageError, match=r"they lack 1\.bias, 1\.weight, 3\.bias.*the network has no low\.bias"):
        fedloom.run("fedrep", "digits", model=row, init=tmp_path / "deep.safetensors", **SETTINGS)


def test_frozen_parameters_stay_and_are_not_sent():
    net = row()
    net[1].requires_grad_(False)
    run = fedloom.run("fedavg", "digits", model=net, **SETTINGS)
    assert set(run.model) == {"3.weight", "3.bias"}
    assert torch.equal(run.module()[1].weight, net[1].weight) and not torch.equal(run.module()[3].weight, net[3].weight)


@pytest.mark.parametrize(
    ("make", "at"), [(row, "3"), (Deep, "top.out.3"), (Soft, None), (Late, None), (Tied, None), (Twice, None)]
)
def test_the_head_is_the_linear_that_makes_the_outputs(make, at):
    net, x = make(), torch.randn(2, 1, 8, 8)
    expected = net.eval()(x)
    found = fitted(net.train(), None, x, 10, "it")
    assert (found.at if isinstance(found, Headed) else None) == at
    assert found.training
    assert torch.equal(found.eval()(x), expected)
    assert torch.equal(bare(found)(x), expected)
    if isinstance(found, Headed):
        assert torch.equal(found.head(found.body(x)), expected)
        assert set(outward(found, found.state_dict())) == set(make().state_dict())
    else:
        assert found is net


def test_halves_that_are_there_stay_as_they_are():
    net = nn.Module()
    net.body, net.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), nn.Linear(4, 10)

    class Halves(nn.Module):
        def __init__(self, between):
            super().__init__()
            self.body, self.head, self.between = (
                nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
                nn.Linear(4, 10),
                between,
            )

        def forward(self, x):
            return self.head(self.between(self.body(x)))

    x = torch.randn(2, 1, 8, 8)
    as_is = Halves(torch.tanh)
    del as_is.between
    type(as_is).between = staticmethod(lambda z: z)
    assert fitted(as_is, None, x, 10, "it") is as_is
    type(as_is).between = staticmethod(torch.tanh)  # which `head(body(x))` would leave out
    cut = fitted(as_is, None, x, 10, "it")
    assert isinstance(cut, Headed) and cut.at == "head"
    assert torch.equal(cut.head(cut.body(x)), cut(x))


@pytest.mark.parametrize(
    ("model", "head", "told"),
    [
        (Soft, "net.3", r"the outputs of .*Soft are not what net\.3 makes of the rest"),
        (Late, "net", r"are not what net makes of the rest"),
        (Tied, "fc", r"has weights, elsewhere too"),
        (Twice, "fc", r"it is run, or has weights, elsewhere too"),
        (row, "2", r"that part of .* has no parameters"),
        (row, "4", r"unknown head of .* '4'"),
        ("mlp:8", "head", r"head=head says what is the head of a network of your own, and mlp:8 has its own"),
        (None, "head", r"head=head says .* and mlp:64 has its own"),
    ],
)
def test_a_head_that_is_none_is_refused(model, head, told):
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", "digits", model=model, head=head, **SETTINGS)


@pytest.mark.parametrize("method", ["fedrep", "fedproto", "fedgh", "moon", "fedgen", "fedjets", "fedma", "ccvr"])
def test_methods_that_work_on_a_head_refuse_a_network_without(method):
    with pytest.raises(UsageError, match=rf"{method} works on the head of a network, .* none is known of .*:Soft"):
        fedloom.run(method, "digits", model=Soft, public=0.1, **SETTINGS)


def test_a_plug_in_around_such_a_method_refuses_too():
    with pytest.raises(UsageError, match="moon works on the head"):
        fedloom.run("feddisco", "digits", model=Soft, inner="moon", **SETTINGS)


def test_others_train_it_all_the_same():
    run = fedloom.run("scaffold", "digits", model=Soft, **SETTINGS | {"rounds": 5})
    assert run.final["global_test_accuracy"] > 0.5 and type(run.module()) is Soft


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            lambda: nn.Linear(3, 10),
            r"cannot read these data: inputs are torch\.float32 \['rows', 1, 8, 8\] \(RuntimeEr",
        ),
        (partial(nn.Linear, 8, 10), r"gives outputs \['rows', 1, 8, 10\], and these data need \['rows', 10\]"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), r"gives outputs \['rows', 7\]"),
        (lambda: nn.LSTM(8, 10), r"cannot read these data"),
        (lambda: nn.Sequential(nn.Flatten(1, 2), nn.LSTM(8, 10)), r"gives a tuple; expected a tensor of outputs"),
        (lambda width: row(), r"width is a parameter without a value.*shape, outputs, num_classes, vocabulary"),
        (lambda: 3, r"gives an int; expected an nn\.Module"),
        (lambda: nn.Linear(-1, 2), r"cannot be made \(\w+: "),
        (3, "model is 3"),
        ("no_such_module:Net", r"unknown model 'no_such_module'.*; one of your own is FILE\.py:NAME"),
        ("torch.nn:Liner", r"torch\.nn has no network 'Liner'"),
        ("absent.py:Net", r"no network file .*absent\.py"),
    ],
)
def test_what_is_no_network_for_these_data_is_told(model, told):
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", "digits", model=model, **SETTINGS)


def test_a_function_gets_what_it_has_parameters_for():
    got = {}

    def make(shape, outputs, num_classes, vocabulary, depth=2):
        got.update(shape=shape, outputs=outputs, num_classes=num_classes, vocabulary=vocabulary, depth=depth)
        return row()

    fedloom.problem("digits", model=make, partition="iid", clients=3)
    assert got == {"shape": (1, 8, 8), "outputs": 10, "num_classes": 10, "vocabulary": 0, "depth": 2}


def test_regression_and_labels_take_one_too():
    net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
    run = fedloom.run("fedrep", "diabetes", problem="regression", model=net, **SETTINGS)
    assert run.client_module(0)(torch.zeros(2, 10)).shape == (2, 1)
    rows = torch.randn(90, 10)
    y = torch.stack([rows[:, 0] > 0, rows[:, 1] > 0], 1).numpy().astype("float32")
    run = fedloom.run(
        "fedavg", (rows, y), problem="multilabel", model=lambda outputs: nn.Linear(10, outputs), **SETTINGS
    )
    assert run.module()(rows).shape == (90, 2)


@pytest.mark.parametrize("problem", ["graph:sbm", "saddle:bilinear,width=5", "vertical:0.1"])
def test_kinds_with_networks_of_their_own_refuse_a_head(problem):
    with pytest.raises(UsageError, match="head"):
        fedloom.problem("digits", problem=problem, head="fc")


def test_the_file_is_named_and_found_in_other_processes(file):
    of_name = fedloom.run("fedrep", "digits", model="nets.py:Net", head="fc", **SETTINGS)
    assert of_name.spec.model == f"{file}:Net" and of_name.spec.head == "fc"
    module = user_networks.module_at(file)
    of_class = fedloom.run("fedrep", "digits", model=module.Net, head="fc", **SETTINGS)
    assert of_class.spec.model == f"{file}:Net"
    same(of_name, of_class)
    same(of_name, fedloom.run("fedrep", "digits", model="nets.py:Net", engine="pool", workers=2, **SETTINGS))
    results = fedloom.compare(
        ["fedavg", "fedrep"], "digits", model="nets.py:Net", seeds=1, jobs=1, report=False, **SETTINGS
    )
    assert not results.failed and {str(cell.run.spec.model) for cell in results.cells} == {f"{file}:Net"}


def test_the_package_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "pack_of_nets"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "shared.py").write_text("WIDTH = 6\n")
    (folder / "nets.py").write_text(
        "from torch import nn\nfrom .shared import WIDTH\n\ndef net(outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.Linear(WIDTH, outputs))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(user_networks, "GIVEN", {})
    of_name = fedloom.run("fedavg", "digits", model="pack_of_nets.nets:net", **SETTINGS)
    of_function = fedloom.run("fedavg", "digits", model=sys.modules["pack_of_nets.nets"].net, **SETTINGS)
    assert of_function.spec.model == of_name.spec.model == "pack_of_nets.nets:net"
    same(of_name, of_function)


def test_a_module_stays_in_this_process():
    run = fedloom.compare(["fedavg", "fedprox"], "digits", model=row(), seeds=1, jobs=2, report=False, **SETTINGS)
    assert not run.failed and len(run.cells) == 2
    settings = [{"model": NET}, {"model": row}]
    run = fedloom.compare(["fedavg"], "digits", settings=settings, seeds=1, report=False, **SETTINGS)
    assert not run.failed and len({cell.run.spec.model for cell in run.cells}) == 2
    same(*(fedloom.run("fedavg", "digits", model=NET, engine=e, **SETTINGS) for e in ("serial", "loopback")))


NET = row()


def test_a_run_on_a_module_is_resumed_with_it_alone(tmp_path, monkeypatch):
    def stop(row):
        raise KeyboardInterrupt

    net, settings = row(), {"report": False, "partition": "iid", "clients": 3, "rounds": 3}
    whole = fedloom.run("fedavg", "digits", model=net, **settings)
    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", "digits", model=net, out=tmp_path / "run", on_round=stop, **settings)
    monkeypatch.setattr(user_networks, "GIVEN", {})  # as in another process
    with pytest.raises(UsageError, match=r"the network Sequential was given in Python.*give it again \(model="):
        fedloom.resume(tmp_path / "run")
    with pytest.raises(UsageError, match="give the same network, of a module with the weights that it had then"):
        fedloom.resume(tmp_path / "run", model=row())
    same(whole, fedloom.resume(tmp_path / "run", model=net, report=False))


def test_a_file_that_changed_is_not_resumed_with(file, tmp_path):
    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", "digits", model="nets.py:Net", out="run", on_round=stop, report=False, **SETTINGS)
    file.write_text(FILE.replace("0.2", "0.3"))
    with pytest.raises(UsageError, match=r"the network .*nets\.py changed since run began"):
        fedloom.resume("run", report=False)


def test_on_the_command_line(file, capsys):
    words = [
        "run",
        "fedrep",
        "--model",
        "nets.py:Net",
        "--head",
        "fc",
        "--clients",
        "3",
        "--rounds",
        "1",
        "--out",
        "run",
    ]
    assert main(words) == 0
    assert main(["run", "fedrep", "--model", "nets.py:Net", "--head", "conv"]) == 2
    assert "head=conv: the outputs of model=" in capsys.readouterr().err


def test_a_stream_takes_one():
    run = fedloom.run("fot", "digits", problem="stream:2,rounds=1", model=row, **SETTINGS)
    assert run.final["round"] == 2
    with pytest.raises(UsageError, match="fot works on the head"):
        fedloom.run("fot", "digits", problem="stream:2,rounds=1", model=Soft, **SETTINGS)


def test_the_pages_example_is_eight_lines_at_most_and_learns():
    page = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()
    (text,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "model=net" in block]
    assert len([line for line in text.splitlines() if line.strip()]) <= 8
    names = {}
    exec(compile(text, "networks.md", "exec"), names)  # noqa: S102 - our own page
    trained = names["trained"]
    assert type(trained) is nn.Sequential and list(trained.state_dict()) == list(names["net"].state_dict())
    right = trained(names["rows"]).argmax(1) == (names["rows"][:, 0] > names["rows"][:, 1]).long()
    assert right.double().mean() > 0.8


IMAGES = (torch.rand(60, 3, 8, 8).numpy(), [k % 3 for k in range(60)])
GREY = (torch.rand(60, 2, 8, 8).numpy(), [k % 3 for k in range(60)])
LIBRARY = {"partition": "iid", "clients": 2, "rounds": 1}


class Small(nn.Module):
    """What the stand-ins of other libraries make."""

    def __init__(self, channels, classes):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(channels, 4, 3), nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3)))


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for libraries that are not here: what they were asked for."""
    asked = []
    timm, torchvision, models = (types.ModuleType(name) for name in ("timm", "torchvision", "torchvision.models"))
    timm.list_models = lambda: ["small", "smaller"]
    models.list_models = lambda module: ["small"] if module is models else ["small", "detector"]

    def create_model(name, pretrained, in_chans, num_classes):
        asked.append((name, pretrained, in_chans, num_classes))
        return Small(in_chans, num_classes)

    def get_model(name, weights, num_classes=1000):
        asked.append((name, weights, num_classes))
        net = Small(3, num_classes)
        if weights:
            nn.init.ones_(net.stem.weight)
        return net

    timm.create_model, models.get_model = create_model, get_model
    for module in (timm, torchvision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_networks_of_timm_are_asked_for_channels_and_classes(libraries):
    run = fedloom.run("fedrep", GREY, model="timm:small", **LIBRARY)
    assert set(libraries) == {("small", False, 2, 3)}
    assert list(run.client_module(0).state_dict()) == ["stem.weight", "stem.bias", "fc.weight", "fc.bias"]
    libraries.clear()
    run = fedloom.run("fedavg", GREY, model="timm:small,pretrained", **LIBRARY)
    assert set(libraries) == {("small", True, 2, 3)}
    libraries.clear()
    assert type(fedloom.load(run.path).module()) is Small  # without the weights that it began with
    assert libraries == [("small", False, 2, 3)]


def test_networks_of_torchvision_get_a_fresh_head_on_their_weights(libraries):
    fedloom.problem(IMAGES, model="torchvision:small", **{k: LIBRARY[k] for k in ("partition", "clients")})
    assert set(libraries) == {("small", None, 3)}
    task = fedloom.problem(IMAGES, model="torchvision:small,pretrained", partition="iid", clients=2)
    net = bare(task.network())
    assert ("small", "DEFAULT", 1000) in libraries
    assert bool((net.stem.weight == 1).all()) and net.fc.out_features == 3


@pytest.mark.parametrize(
    ("data", "model", "told"),
    [
        (GREY, "torchvision:small", "read images of 3 channels, got 2; take timm:small"),
        (IMAGES, "torchvision:detector", "torchvision has no network 'detector'"),
        (IMAGES, "timm:smal", "timm has no network 'smal'; did you mean 'small'"),
        (IMAGES, "timm", "has no name of a network behind it, as in timm:NAME"),
        ((GREY[0].reshape(60, -1), GREY[1]), "timm:small", r"reads images, got numbers of shape \[128\]"),
    ],
)
def test_what_another_library_has_not_is_told(libraries, data, model, told):
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", data, model=model, **LIBRARY)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("transformers:vitt", "transformers has no network 'vitt'; did you mean 'vit'"),
        ("transformers:./no_folder,pretrained", "cannot be made"),
    ],
)
def test_what_transformers_has_not_is_told(model, told):
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", IMAGES, model=model, **LIBRARY)


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_library_that_is_not_installed_is_told(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"needs {library}, which cannot be imported .*: pip install {library}"):
        fedloom.run("fedavg", IMAGES, model=f"{library}:resnet18", **LIBRARY)


def test_an_image_classifier_of_transformers_is_taken_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("resnet", num_labels=7, embedding_size=8, hidden_sizes=[8, 8, 8, 8])
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "net")
    data, model = (torch.rand(60, 3, 32, 32).numpy(), IMAGES[1]), f"transformers:{tmp_path / 'net'},pretrained"
    task = fedloom.problem(data, model=model, partition="iid", clients=2)
    one, other = (bare(task.network()).state_dict() for _ in range(2))
    body = "model.resnet.embedder.embedder.convolution.weight"
    assert torch.equal(one[body], other[body]) and one["model.classifier.1.weight"].shape == (3, 8)
    run = fedloom.run("fedrep", data, model=model, out=tmp_path / "run", report=False, lr=0.01, **LIBRARY)
    assert run.client_module(1)(torch.rand(4, 3, 32, 32)).shape == (4, 3)


def test_a_kind_of_transformers_is_made_for_the_images():
    pytest.importorskip("transformers")
    net = build("transformers:mobilenet_v2", (2, 32, 32), 5)
    assert isinstance(net, Headed) and net.at == "model.classifier"
    assert net.eval()(torch.rand(3, 2, 32, 32)).shape == (3, 5)


@pytest.mark.parametrize(("problem", "data"), [("graph:sbm", "digits"), ("vertical:0.1", "digits")])
def test_kinds_that_take_small_networks_say_so(problem, data, libraries):
    for model, told in ((f"{__file__}:Soft", "none of one's own"), ("timm:small", "timm:small")):
        with pytest.raises(UsageError, match=told):
            fedloom.run(
                "fedavg" if "graph" in problem else "split_learning", data, problem=problem, model=model, rounds=1
            )


def test_a_module_that_processes_of_a_comparison_do_not_find_is_told(tmp_path, monkeypatch):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text("")
    text = "import torch\n\n\ndef net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    (tmp_path / "pack/parts.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    parts = importlib.import_module("pack.parts")
    assert fedloom.run("fedavg", "digits", model=parts.net, clients=3, rounds=1).spec.model == "pack.parts:net"
    told = r"digits/fedavg: model=pack\.parts:net: no module 'pack\.parts' is found here; .* PYTHONPATH: .*=FILE.py:net"
    with pytest.raises(UsageError, match=told):
        fedloom.compare(["fedavg"], "digits", model=parts.net, clients=3, rounds=1, seeds=2, jobs=2)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    results = fedloom.compare(["fedavg"], "digits", model=parts.net, clients=3, rounds=1, seeds=2, jobs=2)
    assert not results.failed and not results.unfinished


def test_a_file_that_is_not_there_is_told_of_every_cell(tmp_path):
    with pytest.raises(UsageError, match=r"cell digits/fedavg: no network file .*nowhere\.py"):
        fedloom.compare(["fedavg"], "digits", model=f"{tmp_path}/nowhere.py:net", clients=3, rounds=1, seeds=2, jobs=2)
