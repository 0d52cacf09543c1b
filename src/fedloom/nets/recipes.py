"""Networks from a recipe: plain JSON that goes along with weights and says what they are the weights of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fedloom import nets
from fedloom.errors import UsageError
from fedloom.nets.pretrained import pretrained, tuned


def made(recipe: Mapping[str, Any]) -> nn.Module:
    """A fresh network; its weights come from torch's global generator.

    `kind` is library, with the arguments of `nets.build`, or pretrained: a backbone that transformers loads, and what
    of it is `tuned`. Raises UsageError for any other.
    """
    kind = recipe.get("kind")
    if kind == "library":
        return nets.build(recipe["model"], tuple(recipe["shape"]), recipe["outputs"], recipe["vocabulary"])
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
    raise UsageError(f"no network is built of a recipe of the kind {kind!r} (known: library, pretrained)")
