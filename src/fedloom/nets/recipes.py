"""Networks from a recipe: plain JSON that goes along with weights and says what they are the weights of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedloom import nets
from fedloom.errors import UsageError
from fedloom.nets import own
from fedloom.nets.pretrained import pretrained, tuned


def made(recipe: Mapping[str, Any]) -> nn.Module:
    """A fresh network; its weights come from torch's global generator.

    `kind` is library, with the arguments of `nets.build`; pretrained, a backbone that transformers loads, and what of
    it is `tuned`; or own, of its user's code. Raises UsageError for any other.
    """
    kind = recipe.get("kind")
    if kind == "library":
        shape, outputs, dense = tuple(recipe["shape"]), recipe["outputs"], recipe.get("dense", False)
        net = nets.build(recipe["model"], shape, outputs, recipe["vocabulary"], dense)
        if dense:
            own.require(net, example(recipe, own.ROWS), (outputs, *shape[1:]), f"model={recipe['model']}")
        return net
    if kind == "pretrained":
        room = recipe["rank"] if recipe["tuned"] == "prompt" else 0
        backbone = pretrained(
            recipe["model"],
            recipe["vocabulary"],
            recipe["length"] + room,
            recipe["seed"],
            recipe["speaking"],
            recipe["layers"],
        )
        return tuned(backbone, recipe["tuned"], recipe["rank"], recipe["padding"], recipe["outputs"])
    if kind == "own":
        text, shape = recipe["model"], tuple(recipe["shape"])
        net = own.make(text, shape, recipe["outputs"], recipe["vocabulary"])
        x, dense = example(recipe, own.ROWS), recipe.get("dense", False)
        return own.fitted(net, recipe["head"], x, recipe["outputs"], f"model={text}", dense)
    raise UsageError(f"no network is built of a recipe of the kind {kind!r} (known: library, pretrained)")


def example(recipe: Mapping[str, Any], rows: int) -> Tensor:
    """Inputs [rows, ...] such as a network of a recipe reads: all rows differ."""
    shape = (rows, recipe["length"]) if recipe["kind"] == "pretrained" else (rows, *recipe["shape"])
    numbers = torch.arange(math.prod(shape)).view(shape)
    return numbers % recipe["vocabulary"] if recipe["vocabulary"] else torch.sin(numbers.float())
