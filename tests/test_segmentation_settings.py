"""Masks as targets: other losses, weights of classes, further measures, confusions of pixels, and exports."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics
from test_segmentation_task import SETTINGS, SIDE, scored, shapes
from torch.nn import functional

import fedloom
from fedloom.data.masks import IGNORED
from fedloom.errors import UsageError
from fedloom.losses import loss_of, of_images
from fedloom.scoring import beside, measured
from fedloom.task import Data
from fedloom.tasks._trained_by import trained_by


def ringed(n=60):
    """The shapes of three classes, whose outermost pixels have no class."""
    x, y = shapes(n, classes=3)
    for edge in (y[:, 0], y[:, -1], y[:, :, 0], y[:, :, -1]):
        edge[:] = IGNORED
    return x, y


def task(data=None, **settings):
    return fedloom.problem(shapes(classes=4) if data is None else data, **SETTINGS | settings)


def by_pixel(outputs, y):
    """The probabilities and the class of each pixel that has one, image by image, in plain Python."""
    for scores, mask in zip(outputs.tolist(), y.tolist(), strict=True):
        image = []
        for h, line in enumerate(mask):
            for w, true in enumerate(line):
                if true != IGNORED:
                    powers = [math.exp(channel[h][w]) for channel in scores]
                    image.append(([one / sum(powers) for one in powers], true))
        yield image


def focal(p, true):
    return (1 - p[true]) ** 2 * -math.log(p[true])


def smooth(p, true):
    return 0.7 * -math.log(p[true]) + 0.3 * sum(-math.log(one) for one in p) / len(p)


PIXELS = {"cross_entropy": lambda p, true: -math.log(p[true]), "focal": focal, "label_smoothing:0.3": smooth}


@pytest.mark.parametrize("weights", [None, "1,3,0.5,2"])
@pytest.mark.parametrize("name", PIXELS)
def test_losses_of_pixels_in_plain_python(name, weights):
    outputs, y = scored()
    y[3] = IGNORED
    each = [float(one) for one in weights.split(",")] if weights else [1.0] * 4
    means = [
        sum(each[true] * PIXELS[name](p, true) for p, true in image) / len(image) if image else 0.0
        for image in by_pixel(outputs, y)
    ]
    made = trained_by(task(), name, weights)
    assert made.criterion(outputs, fedloom.Batch(outputs, y)).item() == pytest.approx(sum(means) / 5)


def test_dice_in_plain_python():
    outputs, y = scored()
    y[3] = IGNORED
    expected = []
    for image in by_pixel(outputs, y):
        dices = []
        for c in {true for _, true in image}:
            hits = sum(p[c] for p, true in image if true == c)
            dices.append(2 * hits / (sum(p[c] for p, _ in image) + sum(true == c for _, true in image)))
        expected.append(1 - sum(dices) / len(dices) if dices else 0.0)
    assert loss_of("dice", "mask")(outputs, y.long()).tolist() == pytest.approx(expected)
    made = trained_by(task(), "dice", None)
    assert made.criterion(outputs, fedloom.Batch(outputs, y)).item() == pytest.approx(sum(expected) / 5)


def test_pixels_without_a_class_have_no_slope():
    outputs, y = scored()
    for name in (*PIXELS, "dice"):
        outputs = outputs.detach().requires_grad_()
        trained_by(task(), name, None).criterion(outputs, fedloom.Batch(outputs, y)).backward()
        nothing = (y == IGNORED)[:, None].expand_as(outputs)
        assert not outputs.grad[nothing].any() and outputs.grad[~nothing].abs().sum() > 0, name


def test_what_cannot_be_counted_counts_nowhere():
    values = torch.tensor([[[1.0, math.nan], [3.0, 8.0]]])
    y = torch.tensor([[[0, IGNORED], [1, IGNORED]]])
    assert of_images(values, y).tolist() == [2.0]


def test_the_problems_own_loss_by_name_changes_no_bit():
    plain, *others = (
        fedloom.run("scaffold", ringed(30), rounds=2, lr=0.1, **SETTINGS | more).model.flat
        for more in ({}, {"loss": "cross_entropy"}, {"class_weights": "1,1,1"})
    )
    assert all(torch.equal(plain, one) for one in others)


def own_pixels(outputs, y):
    return functional.cross_entropy(outputs, y, ignore_index=IGNORED, reduction="none")


def own_rows(outputs, y):
    return of_images(own_pixels(outputs, y), y)


def own_mean(outputs, y):
    return own_rows(outputs, y).mean()


def wrong(outputs, y):
    return outputs.mean((1, 2))


class TestOfOnesOwn:
    def test_it_gives_losses_of_pixels_of_images_or_their_mean(self):
        outputs, y = scored(5, 3)
        batch = fedloom.Batch(outputs, y)
        ours = task(shapes(classes=3)).criterion(outputs, batch)
        for function in (own_pixels, own_rows, own_mean):
            text = f"{__file__}:{function.__name__}"
            made = trained_by(task(shapes(classes=3)), text, None)
            assert made.criterion(outputs, batch).item() == pytest.approx(ours.item())

    def test_weights_need_those_of_pixels(self):
        outputs, y = scored(5, 3)
        weighted, ours = (
            trained_by(task(shapes(classes=3)), name, "1,0,5").criterion(outputs, fedloom.Batch(outputs, y))
            for name in (f"{__file__}:own_pixels", None)
        )
        assert weighted.item() == pytest.approx(ours.item())
        told = rf"gives a tensor \[2\]; expected a loss for each pixel, \[2, {SIDE}, {SIDE}\], that has a gradient"
        with pytest.raises(UsageError, match=told):
            trained_by(task(shapes(classes=3)), f"{__file__}:own_rows", "1,0,5")

    def test_what_is_neither_is_refused(self):
        with pytest.raises(UsageError, match=rf"gives a tensor \[2, {SIDE}\]; expected a loss for each pixel"):
            trained_by(task(shapes(classes=3)), f"{__file__}:wrong", None)


def test_balanced_weights_go_by_the_pixels_of_all_clients():
    made = trained_by(task(ringed()), None, "balanced")
    pixels = np.concatenate([made.data(k, "train").y.numpy().ravel() for k in range(made.population)])
    counts = np.bincount(pixels[pixels != IGNORED])
    assert made.weights.tolist() == pytest.approx((counts.sum() / (3 * counts)).tolist())
    assert made.describe()["class_weights"] == pytest.approx(made.weights.tolist())


@pytest.mark.parametrize(("weights", "said"), [("1,0", 0), ("0,1", 1)])
def test_a_class_without_weight_is_said_no_more(weights, said):
    run = fedloom.run("fedavg", shapes(60), rounds=3, lr=0.3, class_weights=weights, **SETTINGS)
    found = run.confusion(which="last")
    assert found.matrix[:, 1 - said].sum() <= 0.01 * len(found)


@pytest.mark.parametrize("loss", ["dice", "focal:2"])
def test_other_losses_learn_the_shapes(loss):
    run = fedloom.run("fedavg", shapes(120), rounds=6, lr=0.3, loss=loss, **SETTINGS | {"model": "unet:8"})
    assert run.final["global_test_mean_iou"] > 0.8


def test_many_clients_at_once_have_the_losses_of_each_alone():
    for more in ({"loss": "dice"}, {"loss": "focal", "class_weights": "1,2,3"}):
        serial, batched = (
            fedloom.run("fedavg", ringed(30), rounds=2, engine=engine, **SETTINGS | more).model.flat
            for engine in ("serial", "vectorized")
        )
        assert torch.allclose(serial, batched, atol=1e-4)


class TestMeasures:
    NAMES = ("f1", "precision", "recall", "f1:weighted", "recall:micro", "balanced_accuracy")

    def test_they_are_those_of_all_pixels_that_have_a_class(self, monkeypatch):
        outputs, y = scored()
        data = Data(torch.arange(5.0).view(5, 1, 1, 1), y)
        asked = beside(self.NAMES, task())
        found = measured(asked, task(), lambda x: outputs[x.flatten().long()], data)
        counts = (y != IGNORED).numpy()
        true, said = y.numpy()[counts], outputs.argmax(1).numpy()[counts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {
                "f1": metrics.f1_score(true, said, average="macro"),
                "precision": metrics.precision_score(true, said, average="macro"),
                "recall": metrics.recall_score(true, said, average="macro"),
                "f1_weighted": metrics.f1_score(true, said, average="weighted"),
                "recall_micro": metrics.recall_score(true, said, average="micro"),
                "balanced_accuracy": metrics.balanced_accuracy_score(true, said),
            }
        assert found == pytest.approx(expected) and len(found) == 6
        monkeypatch.setattr("fedloom.scoring.PIXELS_AT_ONCE", 1)
        assert measured(asked, task(), lambda x: outputs[x.flatten().long()], data) == pytest.approx(expected)

    def test_macro_f1_is_mean_dice(self):
        run = fedloom.run("fedavg", ringed(), rounds=2, measures="f1", lr=0.3, **SETTINGS)
        assert run.final["global_test_f1"] == pytest.approx(run.final["global_test_dice"])
        assert run.final["worst_client_f1"] <= run.final["personal_test_f1"]

    def test_masks_without_a_class_tell_nothing(self):
        data = Data(torch.zeros(2, 1, 1, 1), torch.full((2, 6, 7), IGNORED, dtype=torch.uint8))
        asked = beside(("f1", "balanced_accuracy"), task())
        assert measured(asked, task(), lambda x: torch.zeros(len(x), 4, 6, 7), data) == {}

    def test_a_function_of_ones_own_sees_masks_and_probabilities(self):
        run = fedloom.run("fedavg", shapes(), rounds=1, measures=[edges], **SETTINGS)
        assert run.final["global_test_edges"] == 12 + 2 / 100

    def test_what_has_too_many_pixels_is_refused(self, monkeypatch):
        monkeypatch.setattr("fedloom.scoring.MOST_BYTES", 8 * 12 * SIDE * SIDE * 2 - 1)
        told = rf"the probabilities of all {12 * SIDE * SIDE} pixels of the global test in 2 classes"
        with pytest.raises(UsageError, match=told):
            fedloom.run("fedavg", shapes(), rounds=1, measures=[edges], **SETTINGS)


def edges(true: np.ndarray, chances: np.ndarray) -> float:
    """The side of the masks, and how many classes there are."""
    assert true.shape == (len(true), SIDE, SIDE) and np.allclose(chances.sum(1), 1)
    return true.shape[2] + chances.shape[1] / 100


@pytest.fixture(scope="module")
def run():
    return fedloom.run("fedavg", task(ringed(), validation=0.2), rounds=3, lr=0.3)


class TestConfusion:
    def true_in(self, run):
        y = np.concatenate([run.given.data(k, "train").y.numpy().ravel() for k in range(3)])
        return np.bincount(y[y != IGNORED])

    def by_hand(self, run, data):
        said = np.stack([one.argmax(0).numpy() for one in run.module()(data.inputs[data.taken(None)])])
        matrix = np.zeros((3, 3), dtype=int)
        for true, here in zip(data.y.numpy().ravel(), said.ravel(), strict=True):
            if true != IGNORED:
                matrix[true, here] += 1
        return matrix

    def test_it_counts_pixels(self, run, monkeypatch):
        found = run.confusion()
        monkeypatch.setattr("fedloom.scoring.PIXELS_AT_ONCE", 1)
        assert (run.confusion(which="last", split="train").matrix.sum(1) == self.true_in(run)).all()
        assert found.classes == ("0", "1", "2")
        assert (found.matrix == self.by_hand(run, run.given.global_test())).all()
        assert len(found) == 12 * (SIDE - 2) ** 2
        hits = found.matrix.diagonal()
        ious = hits / (found.matrix.sum(0) + found.matrix.sum(1) - hits)
        assert ious.mean() == pytest.approx(run.final["global_test_mean_iou"])
        assert found.per_class()[1]["f1"] == pytest.approx(2 * hits[1] / (found.matrix.sum(0) + found.matrix.sum(1))[1])

    def test_of_clients_and_of_other_splits(self, run):
        every = run.confusion(client="all")
        assert (every.matrix == run.confusion().matrix).all()
        one = run.confusion(client=1, split="validation")
        assert (one.matrix == self.by_hand(run, run.given.data(1, "validation"))).all() and len(one)

    def test_the_page_shows_it(self, tmp_path):
        out = tmp_path / "run"
        fedloom.run("fedavg", ringed(30), rounds=1, out=out, **SETTINGS)
        page = (out / "report.html").read_text()
        assert "Which classes the global model takes for which" in page
        assert re.search(r">test pixels</th>", page)
        again = fedloom.load(out)
        assert len(again.confusion()) == 6 * (SIDE - 2) ** 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch would have all take torch.export
@pytest.mark.parametrize("side", [12, 17])
@pytest.mark.parametrize("to", ["torchscript", "torch-export", "onnx"])
def test_the_network_of_masks_is_exported(to, side, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxscript")
        session = pytest.importorskip("onnxruntime")
    run = fedloom.run("fedavg", shapes(30, side), rounds=1, lr=0.1, **SETTINGS)
    path = str(run.export(to, tmp_path / "net"))
    read = {
        "torchscript": lambda: torch.jit.load(path),
        "torch-export": lambda: torch.export.load(path).module(),
        "onnx": lambda: lambda x: torch.from_numpy(session.InferenceSession(path).run(None, {"inputs": x.numpy()})[0]),
    }[to]()
    net = run.module()
    for rows in (1, 5):
        x = torch.randn(rows, 1, side, side)
        with torch.no_grad():
            torch.testing.assert_close(read(x), net(x), rtol=1e-4, atol=1e-5)
