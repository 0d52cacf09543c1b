"""Networks of other libraries, by their names there: `timm:resnet18`, `torchvision:mobilenet_v2`, `transformers:vit`.

The library makes the network, and its head with as many outputs as there are classes; nothing of it is in this package.
With `,pretrained` behind the name it has the weights that the library loads, and a fresh head.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError, nearest
from fedloom.nets import own

PRETRAINED = ",pretrained"


def timm(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> nn.Module:
    """A network of timm, which reads images of any number of channels."""

    def make(library: Any, name: str, weights: bool) -> nn.Module:
        _listed("timm", name, library.list_models())
        net: nn.Module = library.create_model(name, pretrained=weights, in_chans=shape[0], num_classes=classes)
        return net

    return _made("timm", options, shape, classes, vocabulary, make)


def torchvision(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> nn.Module:
    """A classifier of torchvision, which reads images of three channels."""

    def make(library: Any, name: str, weights: bool) -> nn.Module:
        models = importlib.import_module("torchvision.models")
        _listed("torchvision", name, models.list_models(module=models))
        if shape[0] != 3:
            raise UsageError(f"torchvision's networks read images of 3 channels, got {shape[0]}; take timm:{name}")
        if not weights:
            plain: nn.Module = models.get_model(name, weights=None, num_classes=classes)
            return plain
        return _with_head(models.get_model(name, weights="DEFAULT"), shape, classes, f"torchvision:{options}")

    return _made("torchvision", options, shape, classes, vocabulary, make)


def transformers(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> nn.Module:
    """An image classifier of transformers: a kind of model with fresh weights, or a folder or a name on the hub."""

    def make(library: Any, name: str, weights: bool) -> nn.Module:
        auto = library.AutoModelForImageClassification
        if weights or "/" in name:
            config = library.AutoConfig.from_pretrained(name)
            config.num_labels = classes
            if weights:
                return Logits(auto.from_pretrained(name, config=config, ignore_mismatched_sizes=True))
        else:
            known = importlib.import_module("transformers.models.auto.modeling_auto")
            _listed("transformers", name, sorted(known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES))
            sizes = {"num_labels": classes, "num_channels": shape[0], "image_size": shape[1]}
            config = library.AutoConfig.for_model(name, **sizes)
        return Logits(auto.from_config(config))

    return _made("transformers", options, shape, classes, vocabulary, make)


class Logits(nn.Module):
    """A model of transformers, of whose outputs only the scores are given on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(pixel_values=x).logits
        return scores


def without_weights(text: str) -> str:
    """The name of a network without what says that its weights are loaded, for who has other weights for it."""
    return text.removesuffix(PRETRAINED)


def _made(
    library: str,
    options: str,
    shape: tuple[int, ...],
    classes: int,
    vocabulary: int,
    make: Callable[[Any, str, bool], nn.Module],
) -> nn.Module:
    """What a library makes, as methods take it."""
    what = f"model={library}:{options}"
    if not options:
        raise UsageError(f"model={library} has no name of a network behind it, as in {library}:NAME")
    if vocabulary or len(shape) != 3:
        got = f"texts of {shape[0]} tokens" if vocabulary else f"numbers of shape {list(shape)}"
        raise UsageError(f"{what} reads images, got {got}; take another network, or problem=finetune for texts")
    try:
        found = importlib.import_module(library)
    except ImportError as error:
        raise UsageError(f"{what} needs {library}, which cannot be imported ({error}): pip install {library}") from None
    name = without_weights(options)
    try:
        net = make(found, name, name != options)
    except UsageError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise UsageError(f"{what} cannot be made ({type(error).__name__}: {told})") from error
    return own.fitted(net, None, _images(shape), classes, what)


def _with_head(net: nn.Module, shape: tuple[int, ...], classes: int, what: str) -> nn.Module:
    """A network with another Linear for its outputs, of so many."""
    at = own.last(net, _images(shape))
    if at is None:
        raise UsageError(f"model={what} ends in no Linear that could be made anew for {classes} outputs; take another")
    before = net.get_submodule(at)
    assert isinstance(before, nn.Linear)
    own.put(net, at, nn.Linear(before.in_features, classes))
    return net


def _images(shape: tuple[int, ...]) -> Tensor:
    count = own.ROWS * shape[0] * shape[1] * shape[2]
    return torch.sin(torch.arange(count).float()).view(own.ROWS, *shape)


def _listed(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise UsageError(f"{library} has no network {name!r}{nearest(name, known)}")
