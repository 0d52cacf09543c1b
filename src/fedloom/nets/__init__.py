"""Small reference networks, built by name; big ones come from their own libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fedloom.errors import UsageError, unknown
from fedloom.members import Registry
from fedloom.parsing import Term
from fedloom.user_networks import is_own, unfound

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fedloom.nets.net import Net


class Entry(NamedTuple):
    """A network in the table: `module` is its file here, `syntax` how it is asked for, `needs` the data it reads."""

    module: str
    syntax: str
    line: str
    needs: str


NUMBERS, IMAGES, TEXT, GRAPHS = "images or numbers", "images", "text", "graphs"
MASKED = "images with masks"  # for scores of every pixel
WINDOWS, SEQUENCES = "windows", "text or windows"  # of rows of a series
READ = {NUMBERS: (NUMBERS, IMAGES, WINDOWS), SEQUENCES: (TEXT, WINDOWS)}  # what reads more than one kind of data

NETS = {
    "linear": Entry("mlp", "linear", "multinomial logistic regression", NUMBERS),
    "mlp": Entry("mlp", "mlp:WIDTH,...", "hidden layers with ReLU (default 64)", NUMBERS),
    "dnn": Entry("mlp", "dnn", "one hidden layer of 100, as PFLlib's DNN", NUMBERS),
    "cnn": Entry("cnn", "cnn:WIDTH,...", "two 5x5 convolutions and 512 hidden, as PFLlib's FedAvgCNN", IMAGES),
    "lenet": Entry("cnn", "lenet:WIDTH,...", "LeNet-5 with ReLU", IMAGES),
    "resnet8": Entry("resnet", "resnet8:NORM", "residual network, norm batch (default) or group", IMAGES),
    "resnet18": Entry("resnet", "resnet18:NORM", "residual network, norm batch (default) or group", IMAGES),
    "resnet": Entry("resnet", "resnet:BLOCKS,NORM", "residual network, so many blocks a stage (default 1)", IMAGES),
    "unet": Entry("unet", "unet:WIDTH", "U-Net with GroupNorm, so many maps at first (default 16)", MASKED),
    "lstm": Entry("text", "lstm:HIDDEN", "two LSTM layers (default 256), as LEAF's Shakespeare model", SEQUENCES),
    "gru": Entry("series", "gru:HIDDEN,LAYERS", "gated recurrent units (default 64,1)", WINDOWS),
    "transformer": Entry("text", "transformer:WIDTH,LAYERS", "small attention encoder (default 64,2)", SEQUENCES),
    "gcn": Entry("gcn", "gcn:WIDTH,DROPOUT", "two graph convolutions (default 64,0)", GRAPHS),
}
LIBRARIES = ("timm", "torchvision", "transformers")  # whose networks are taken by their names there: `timm:resnet18`
# What builds each: a function of the text after the colon, the shape of a row, and the numbers of classes and of words.
BUILDERS: Registry[Callable[[str, tuple[int, ...], int, int], nn.Module]] = Registry(
    "model",
    "fedloom.networks",
    {name: f"fedloom.nets.{entry.module}:{name}" for name, entry in NETS.items()}
    | {name: f"fedloom.nets.libraries:{name}" for name in LIBRARIES},
)


def reads_series(model: str | None) -> bool:
    """Whether a network by name reads windows of series, and no images."""
    entry = NETS.get(Term(model).name) if model else None
    return entry is not None and entry.needs in (WINDOWS, SEQUENCES)


def build(name: str, input_shape: tuple[int, ...], classes: int, vocabulary: int = 0, dense: bool = False) -> nn.Module:
    """A freshly initialised network: `NAME` or `NAME:OPTIONS` as in `describe()`.

    Args:
        name: for example `cnn`, `mlp:128,64`, `resnet8:group`, `timm:resnet18`.
        input_shape: one row without the batch: images (C, H, W), text (L,), windows (T, C), else numbers.
        classes: scores a row.
        vocabulary: number of token ids, padding (0) included; zero says that the data are not text.
        dense: whether scores are of every pixel, [classes, H, W], in place of [classes].

    Its weights are torch's defaults, drawn from torch's global generator: call it inside `fedloom.random.seeded`.

    Raises:
        UsageError: the name is not known, its options do not fit, or the network cannot read such data.
    """
    term = Term(name)
    entry = NETS.get(term.name)  # None: of an installed package
    if entry and term.rest is not None and (not term.rest or ":" not in entry.syntax):
        raise UsageError(f"model {name!r} has options that do not fit; expected {entry.syntax}")
    if classes < 1:
        raise UsageError(f"model {name!r} needs at least one class, got {classes}; check the label column")
    data = TEXT if vocabulary else {3: MASKED if dense else IMAGES, 2: WINDOWS}.get(len(input_shape), NUMBERS)
    if entry and data not in READ.get(entry.needs, (entry.needs,)):
        fitting = [
            other
            for other, that in NETS.items()
            if that.needs == data or (that.needs == SEQUENCES and data in READ[SEQUENCES])
        ]
        got = "numbers" if data == NUMBERS else data
        raise UsageError(
            f"model {name!r} reads {entry.needs}, got {got} of shape {tuple(input_shape)}; take {' or '.join(fitting)}"
        )
    if is_own(name, BUILDERS):
        raise UsageError(f"model={name}: this kind of problem takes networks by name, and none of one's own")
    if term.name not in BUILDERS:
        lacking = unfound(name)
        if "." in term.name and lacking:
            raise UsageError(f"model={name}: {lacking}")
        raise UsageError(
            f"{unknown('model', term.name, BUILDERS)}; one of your own is FILE.py:NAME, MODULE:NAME, or in Python the "
            f"module, class or function itself{lacking and f' ({lacking})'}"
        )
    return BUILDERS[term.name](term.rest or "", tuple(input_shape), classes, vocabulary)


def reference(name: str, input_shape: tuple[int, ...], classes: int) -> Net:
    """One of the library's own networks, as `build` makes it; raises UsageError for those of other libraries."""
    from fedloom.nets.net import Net

    net = build(name, input_shape, classes)
    if not isinstance(net, Net):
        raise UsageError(f"model={name}: this kind of problem takes {', '.join(NETS)} alone")
    return net


def describe() -> list[tuple[str, str, str]]:
    """The networks there are: (how to ask for it, one line, the data it needs)."""
    return [(entry.syntax, entry.line, entry.needs) for entry in NETS.values()]
