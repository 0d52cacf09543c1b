"""Masks as targets: what is learned and judged, how masks are read and dealt, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fedloom
from fedloom.cli import main
from fedloom.data.masks import IGNORED
from fedloom.errors import UsageError
from fedloom.nets import build
from fedloom.quality import overlap, tallies
from fedloom.random import numpy_stream, seeded
from fedloom.task import Data
from fedloom.tasks.segmentation import measures, pixel_losses

SETTINGS = {"problem": "segmentation", "partition": "iid", "clients": 3, "model": "unet:4"}
SIDE = 12


def shapes(n=60, side=SIDE, classes=2):
    """Noise with a bright square in each image, or a dark one, which are the classes 1 and 2; all else is 0."""
    draw = numpy_stream(0, "test", "shapes")
    x, y = draw.normal(0, 0.3, (n, side, side)).astype(np.float32), np.zeros((n, side, side), dtype=np.int64)
    for row in range(n):
        top, left = draw.integers(0, side - 5, 2)
        kind = 1 + row % (classes - 1) if classes > 2 else 1
        y[row, top : top + 5, left : left + 5] = kind
        x[row][y[row] == kind] += 1.5 if kind == 1 else -1.5
    return x, y


def by_hand(said, true, classes):
    """Mean IoU, mean Dice and pixel accuracy of masks, in sets of pixels."""
    pixels = [
        (place, s, t) for place, (s, t) in enumerate(zip(said.ravel(), true.ravel(), strict=True)) if t != IGNORED
    ]
    ious, dices = [], []
    for c in range(classes):
        ours, theirs = {p for p, s, _ in pixels if s == c}, {p for p, _, t in pixels if t == c}
        if ours | theirs:
            ious.append(len(ours & theirs) / len(ours | theirs))
            dices.append(2 * len(ours & theirs) / (len(ours) + len(theirs)))
    return np.mean(ious), np.mean(dices), np.mean([s == t for _, s, t in pixels])


def scored(n=5, classes=4):
    """Scores of random images, and masks without the class 3, some of whose pixels are ignored."""
    draw = numpy_stream(0, "test", "scored")
    y = draw.integers(0, 3, (n, 6, 7)).astype(np.uint8)
    y[draw.random(y.shape) < 0.2] = IGNORED
    y[1] = 2  # one image is of one class
    outputs = torch.from_numpy(draw.normal(size=(n, classes, 6, 7)))
    outputs[:, 3:] -= 9  # said nowhere either
    return outputs, torch.from_numpy(y)


def test_the_measures_in_sets_of_pixels(monkeypatch):
    outputs, y = scored()
    data = Data(torch.arange(5.0).view(5, 1, 1, 1), y)

    def scores(x):
        return outputs[x.flatten().long()]

    found = measures(scores, data, 4)
    iou, dice, right = by_hand(outputs.argmax(1).numpy(), y.numpy(), 4)
    assert found["mean_iou"] == pytest.approx(iou) and found["dice"] == pytest.approx(dice)
    assert found["pixel_accuracy"] == pytest.approx(right) and found["n"] == 5
    monkeypatch.setattr("fedloom.tasks.segmentation.PIXELS_AT_ONCE", 1)
    assert measures(scores, data, 4) == pytest.approx(found)
    everything_ignored = Data(torch.zeros(1, 1, 1, 1), torch.full((1, 6, 7), IGNORED, dtype=torch.uint8))
    empty = measures(scores, everything_ignored, 4)
    assert [empty[name] for name in ("loss", "mean_iou", "dice", "pixel_accuracy")] == [0, 1, 1, 1]


def test_the_loss_in_plain_python():
    outputs, y = scored(3, 3)
    y[2] = IGNORED
    expected = []
    for scores, mask in zip(outputs.tolist(), y.tolist(), strict=True):
        losses = []
        for h, line in enumerate(mask):
            for w, true in enumerate(line):
                if true != IGNORED:
                    here = [scores[c][h][w] for c in range(3)]
                    losses.append(math.log(sum(map(math.exp, here))) - here[true])
        expected.append(sum(losses) / len(losses) if losses else 0.0)
    assert pixel_losses(outputs, y).tolist() == pytest.approx(expected)
    task = fedloom.problem(shapes(), **SETTINGS)
    assert task.criterion(outputs, fedloom.Batch(outputs, y)).item() == pytest.approx(sum(expected) / 3)
    assert measures(lambda x: outputs, Data(outputs, y), 3)["loss"] == pytest.approx(sum(expected) / 3)


def test_clients_make_one_measure_by_what_they_count():
    """Pooled over clients, each judged by the global model, a measure is that of all their pixels together."""
    run = fedloom.run("fedavg", shapes(), rounds=3, lr=0.3, **SETTINGS)
    for name in ("mean_iou", "dice", "pixel_accuracy"):
        assert run.final[f"personal_test_{name}"] == pytest.approx(run.final[f"global_test_{name}"], abs=1e-12)
    each = json.loads((run.path / "clients.jsonl").read_text().splitlines()[-1])
    mean = np.average(each["mean_iou"], weights=each["n"])
    assert abs(mean - run.final["personal_test_mean_iou"]) > 1e-6  # which no mean over images is
    assert not [column for column in run.final if "#" in column]
    both = {
        key: a + b
        for (key, a), b in zip(
            tallies([1, 3], [2, 3], [1, 4]).items(), tallies([0, 5], [1, 5], [0, 6]).values(), strict=True
        )
    }
    assert overlap("mean_iou", both) == pytest.approx((1 / 3 + 8 / 10) / 2)
    assert overlap("mean_iou", tallies([1, 0], [2, 0], [1, 1])) == 0.25  # what is said and nowhere true is wrong


def test_a_small_network_learns_shapes():
    data = shapes(120, classes=3)
    run = fedloom.run("fedavg", data, rounds=6, lr=0.3, **SETTINGS | {"model": "unet:8"})
    baseline = run.partition["baseline"]
    assert baseline["of"] == "The class 0 in every pixel" and baseline["mean_iou"] < 0.34
    assert run.final["global_test_mean_iou"] > 0.8 and run.final["global_test_dice"] > 0.85
    said = run.predict(data[0])
    assert said[0].shape == (SIDE, SIDE) and (np.stack(said) == data[1]).mean() > 0.95
    chances = run.predict(data[0][:3], probabilities=True)
    assert chances[0].shape == (3, SIDE, SIDE) and np.allclose(chances[0].sum(0), 1)
    assert (chances[2].argmax(0) == said[2]).all()
    assert np.trace(run.confusion().matrix) / len(run.confusion()) == run.final["global_test_pixel_accuracy"]


def test_engines_agree():
    runs = [
        fedloom.run("scaffold", shapes(), rounds=2, engine=engine, **SETTINGS)
        for engine in ("serial", "pool", "loopback", "vectorized")
    ]
    serial, *exact, batched = [run.model.flat for run in runs]
    assert all(torch.equal(serial, one) for one in exact)
    assert torch.allclose(serial, batched, atol=1e-4)
    traced = fedloom.load(runs[3].path)
    assert traced.final["global_test_mean_iou"] == pytest.approx(runs[0].final["global_test_mean_iou"], abs=0.02)


def test_clients_of_a_batch_have_one_loss_function():
    """Of many clients at once the loss is that of each alone: what `vectorized` and DP by samples take."""
    outputs, y = scored()
    each = torch.vmap(lambda out, mask: pixel_losses(out[None], mask[None]).mean())(outputs, y)
    assert torch.allclose(each, pixel_losses(outputs, y))


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedprox", "ditto", "fedbuff", "fedbn", "moon", "fedrep"])
def test_methods_unlike_each_other_run_twice_alike(method):
    runs = [fedloom.run(method, shapes(30), rounds=2, **SETTINGS) for _ in range(2)]
    assert runs[0].final["personal_test_mean_iou"] == runs[1].final["personal_test_mean_iou"] is not None
    assert math.isfinite(runs[0].final["global_test_loss"] or 0)


def test_privacy_of_clients():
    run = fedloom.run("fedavg", shapes(30), rounds=1, dp="client:clip=1,noise=0.5", **SETTINGS)
    assert math.isfinite(run.final["global_test_loss"])


# Reading


def encoded(values, test=None, **settings):
    """The task of random images and masks of these values."""
    draw = numpy_stream(0, "test", "encoded")
    masks = draw.choice(values, (30, 4, 4))
    masks[:5, 0] = values[: len(values)] if len(values) == 4 else np.resize(values, 4)
    both = (draw.random((30, 4, 4)), masks)
    data = both if test is None else (both, (draw.random((8, 4, 4)), draw.choice(test, (8, 4, 4))))
    return fedloom.problem(data, **SETTINGS | settings), masks


def test_values_become_classes():
    task, masks = encoded([0, 3, 7])
    assert task.outputs() == {"kind": "mask", "classes": ["0", "3", "7"]} and task.width == 3
    whole = torch.tensor([0, 3, 7])[task.federation.y.long()]
    assert sorted(map(tuple, whole.flatten(1).tolist())) == sorted(map(tuple, masks.reshape(30, -1).tolist()))
    task, _ = encoded([0, 255])
    assert task.outputs()["classes"] == ["0", "1"] and set(task.federation.y.unique().tolist()) == {0, 1}
    assert any("classes 0 and 1" in line for line in task.describe()["decisions"])
    task, masks = encoded([0, 1, 2, 255])
    assert task.outputs()["classes"] == ["0", "1", "2"]
    assert (task.federation.y == IGNORED).sum() == (masks == 255).sum()
    assert any("255 have no class" in line for line in task.describe()["decisions"])
    task, _ = encoded([0, 1], test=[0, 1, 255])
    assert task.outputs()["classes"] == ["0", "1"] and (task.federation.y == IGNORED).any()
    task, _ = encoded([False, True])
    assert task.outputs()["classes"] == ["0", "1"]


def test_dealing_by_the_foremost_class():
    x, y = shapes(90, classes=4)
    task = fedloom.problem((x, y), **SETTINGS | {"partition": "classes:1"})
    held = [set(task.data(k, "train").y.unique().tolist()) - {0} for k in range(3)]
    assert sorted(map(tuple, held)) == [(1,), (2,), (3,)]


def write(folder, x, y, split="", client=""):
    for row, (image, mask) in enumerate(zip(x, y, strict=True)):
        for kind, pixels in (("images", np.uint8(np.clip(image * 40 + 120, 0, 255))), ("masks", np.uint8(mask))):
            path = Path(folder, split, kind, client, f"{row}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def test_a_folder_of_images_and_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = shapes(40)
    write("plain", x, y * 255)
    arrays = (np.uint8(np.clip(x * 40 + 120, 0, 255)), y)
    order = sorted(range(40), key=lambda row: f"plain/images/{row}.png")
    one = fedloom.problem("plain", **SETTINGS)
    other = fedloom.problem(tuple(part[order] for part in arrays), **SETTINGS)
    assert torch.equal(one.federation.x, other.federation.x) and torch.equal(one.federation.y, other.federation.y)
    write("split", x[:30], y[:30], "train")
    write("split", x[30:], y[30:], "test")
    whole = fedloom.problem("split", **SETTINGS)
    assert len(whole.global_test()) == 10
    for client in ("anna", "ben"):
        write("owned", x[:10], y[:10], client=client)
    owned = fedloom.problem("owned", problem="segmentation", model="unet:4", partition="column:folder")
    assert owned.population == 2 and [*owned.federation.names] == ["anna", "ben"]
    np.savez("both.npz", image_train=arrays[0][:30], mask_train=y[:30], image_test=arrays[0][30:], mask_test=y[30:])
    assert torch.equal(fedloom.problem("both.npz", **SETTINGS).global_test().y, whole.global_test().y)
    words = ["run", "fedavg", "--problem", "segmentation", "--data", "plain", "--model", "unet:4"]
    assert main([*words, "--rounds", "1", "--clients", "3", "--out", "run"]) == 0
    assert main(["predict", "run", "plain", "--out", "said"]) == 0
    found = sorted(Path("said").rglob("*.png"))
    assert [file.name for file in found] == sorted(f"{row}.png" for row in range(40))
    said = fedloom.load("run").predict("plain/images")
    assert (np.asarray(Image.open(found[3])) == said[3]).all() and said[3].shape == (SIDE, SIDE)
    assert main(["predict", "run", "plain/images"]) != 0
    assert fedloom.load("run").export("torchscript").exists()  # once what it gives was compared


def test_resizing_takes_the_nearest_of_a_mask(tmp_path):
    x, y = shapes(20)
    x8 = np.uint8(np.clip(x * 40 + 120, 0, 255))
    large = [np.kron(part, np.ones((1, 2, 2), dtype=part.dtype)) for part in (x8, y)]
    write(tmp_path, large[0], large[1])
    for data in (str(tmp_path), (large[0], large[1])):
        task = fedloom.problem(data, resize=SIDE, **SETTINGS)
        assert task.federation.y.shape[1:] == (SIDE, SIDE)
        assert sorted(task.federation.y.sum((1, 2)).tolist()) == [25] * 20
    between = fedloom.problem((x8, 2 * y), resize=7, **SETTINGS)
    assert between.outputs()["classes"] == ["0", "2"]  # and nothing between them


def test_palettes_and_grey_in_three_channels_are_numbers(tmp_path):
    x, y = shapes(20)
    write(tmp_path, x, y)
    expected = fedloom.problem(str(tmp_path), **SETTINGS).federation.y
    for row, mask in enumerate(y):
        image = Image.fromarray(np.uint8(mask))
        if row % 2:
            image = Image.merge("RGB", [image] * 3)
        else:
            image = image.convert("P")
            image.putdata(mask.ravel().tolist())
            image.putpalette([0, 0, 0, 200, 30, 40] + [9] * 762)
        image.save(tmp_path / "masks" / f"{row}.png")
    assert torch.equal(fedloom.problem(str(tmp_path), **SETTINGS).federation.y, expected)


# Networks


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 8), (2, 17, 9), (1, 16, 16)])
@pytest.mark.parametrize("name", ["unet", "unet:3"])
def test_the_network_takes_images_of_any_size(name, shape):
    net = build(name, shape, 5, dense=True)
    x = torch.randn(2, *shape)
    out = net(x)
    assert out.shape == (2, 5, *shape[1:]) and torch.equal(out, net.head(net.body(x)))
    assert isinstance(net.head, nn.Conv2d) and net.head.kernel_size == (1, 1)
    assert not [name for name, _ in net.named_buffers()]
    assert torch.allclose(net(x[:1]), out[:1], atol=1e-5)


def test_the_network_joins_what_went_down_beside():
    """The sides are halved at each level, and a pixel's own value reaches its scores past all of that."""
    with seeded(0, "test", "unet"):
        net = build("unet:4", (1, 17, 16), 2, dense=True)
    sides = []
    for block in net.body.down:
        block.register_forward_hook(lambda _, __, out: sides.append(tuple(out.shape[1:])))
    x = torch.randn(1, 1, 17, 16).requires_grad_()
    net(x)
    assert sides == [(4, 17, 16), (8, 9, 8), (16, 5, 4), (32, 3, 2)]
    for block in net.body.up:  # what comes from below is silenced
        block.conv1.weight.data[:, block.conv1.weight.shape[0] :] = 0
    (slope,) = torch.autograd.grad(net(x)[0, 1, 0, 0], x)
    assert slope[0, 0, 0, 0] != 0


class Pixelwise(nn.Module):
    def __init__(self, outputs=2):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, outputs, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class Halved(Pixelwise):
    def forward(self, x):
        return super().forward(x)[..., ::2, ::2]


def test_a_network_of_ones_own():
    task = fedloom.problem(shapes(), **SETTINGS | {"model": Pixelwise})
    net = task.network()
    assert [name for name, _ in net.named_children()] == ["body", "head"] and isinstance(net.head, nn.Conv2d)
    run = fedloom.run("fedrep", shapes(30), rounds=1, **SETTINGS | {"model": Pixelwise})
    assert isinstance(run.client_module(0), Pixelwise)


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        ({}, {"model": "cnn"}, "reads images, got images with masks of shape .*; take unet"),
        ({}, {"model": Halved}, "scores of as many classes as masks have, for every pixel"),
        ({}, {"model": Pixelwise(3)}, "these data need .*2, 12, 12"),
        ({}, {"problem": "classification"}, "several labels a row are no classes"),
        ({}, {"method": "fedproto"}, "fedproto needs classes"),
        ({}, {"loss": "huber"}, "unknown loss 'huber' .*cross_entropy, dice, focal, label_smoothing"),
        ({}, {"class_weights": "1,2,3"}, "3 numbers, of which none may be negative, for 2 classes"),
        ({}, {"class_weights": "balanced", "loss": "dice"}, "compares regions, in which every class counts alike"),
        ({}, {"measures": "auc"}, "whose target is a mask, whose pixels are counted and their probabilities not kept"),
        ({}, {"partition": "iid+rotation:30"}, "leaves their masks as they are"),
        ({}, {"partition": "iid+flip:0.3"}, "this target has none"),
        ({}, {"embed": "random"}, "has features inputs"),
        ({"x": np.zeros((60, 9))}, {}, "learns masks of images"),
        ({"x": np.zeros((60, 9, 9))}, {}, "images of 9x9 and masks of 12x12 pixels"),
        ({"y": np.zeros(60, int)}, {}, "masks are arrays"),
        ({"y": np.full((60, 12, 12), 0.5)}, {}, "hold fractions"),
        ({"y": np.full((60, 12, 12), -1)}, {}, "from -1 to -1"),
        ({"y": np.full((60, 12, 12), 300)}, {}, "from 300 to 300"),
        ({"y": np.zeros((60, 12, 12), int)}, {}, "one class only"),
    ],
)
def test_what_cannot_be_is_refused_in_words(change, settings, told):
    x, y = shapes()
    settings = {"rounds": 1} | SETTINGS | settings
    with pytest.raises(UsageError, match=told):
        fedloom.run(settings.pop("method", "fedavg"), (change.get("x", x), change.get("y", y)), **settings)


def test_files_that_do_not_fit_are_refused_in_words(tmp_path):
    x, y = shapes(20)
    write(tmp_path, x, y)
    (tmp_path / "masks" / "7.png").rename(tmp_path / "masks" / "seven.png")
    with pytest.raises(UsageError, match="2 files without a partner, such as the image 7"):
        fedloom.problem(str(tmp_path), **SETTINGS)
    (tmp_path / "masks" / "seven.png").unlink()
    Image.fromarray(np.uint8(numpy_stream(0, "test", "colours").integers(0, 255, (SIDE, SIDE, 3)))).save(
        tmp_path / "masks" / "7.png"
    )
    with pytest.raises(UsageError, match="the mask has colours"):
        fedloom.problem(str(tmp_path), **SETTINGS)
    Image.fromarray(np.uint8(np.zeros((5, 5)))).save(tmp_path / "masks" / "7.png")
    with pytest.raises(UsageError, match="masks of 2 sizes"):
        fedloom.problem(str(tmp_path), **SETTINGS)
    with pytest.raises(UsageError, match="would make a client of each image"):
        fedloom.problem(str(tmp_path), problem="segmentation", partition="column:file")
    with pytest.raises(UsageError, match="lies in no client's folder"):
        fedloom.problem(str(tmp_path), problem="segmentation", partition="column:folder")
    with pytest.raises(UsageError, match="class '2' in the test split but not in the training split"):
        encoded([0, 1], test=[0, 1, 2])
    with pytest.raises(UsageError, match="reads images with masks, got images"):
        fedloom.run("fedavg", "digits", model="unet", rounds=1)
