"""From raw inputs to the features that a problem is about: once for all rows that are read, and for new ones later."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.determinism import reproducible
from fedloom.encoders import cache
from fedloom.encoders.encoder import Encoder, digest_of
from fedloom.encoders.registry import build
from fedloom.errors import UsageError
from fedloom.random import seeded

AT_ONCE = 64  # rows in one forward pass: always so many, for their number may change the last bits
PROBED = 8  # rows that are encoded in any case, to see that this machine and these libraries make the same of them


@dataclass(frozen=True)
class Features:
    """What makes the inputs of a problem of raw ones: `setting` names a frozen encoder; then a normalisation.

    It is called on raw inputs [B, *shape] as they were read (images in [0, 1], tokens), or on a list of texts where the
    encoder reads texts, and gives features [B, D] as the problem's rows have them, to the last bits. Gradients pass
    through it to the inputs. `mean` and `deviation` [D] are of the features of training rows.
    """

    setting: str
    shape: tuple[int, ...]
    digest: str
    mean: Tensor
    deviation: Tensor

    def __call__(self, inputs: Tensor | Sequence[str]) -> Tensor:
        """Features [B, D] of raw inputs, on their device."""
        if not isinstance(inputs, Tensor):
            encode = build(self.setting).encode()
            if encode is None:
                raise UsageError(f"the encoder {self.setting} reads images, and was given texts")
            inputs = encode(list(inputs), list(inputs))[0]
        elif inputs.dim() != len(self.shape) + 1:
            raise UsageError(
                f"the encoder {self.setting} reads raw inputs [B, {', '.join(map(str, self.shape))}], and was given "
                f"{list(inputs.shape)}"
            )
        found: Tensor = _placed(self.setting, self.shape, str(inputs.device))(inputs)
        return (found - self.mean.to(found)) / self.deviation.to(found)

    def to(self, device: torch.device) -> Features:
        """The same for inputs on a device."""
        return replace(self, mean=self.mean.to(device), deviation=self.deviation.to(device))

    def describe(self) -> dict[str, Any]:
        """Which encoder this is, for a record."""
        return {"name": self.setting, "digest": self.digest, "features": len(self.mean)}

    def stored(self) -> dict[str, Any]:
        """All of it, as JSON has it: `Features.restored` takes it up again."""
        numbers = {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}
        return self.describe() | {"shape": list(self.shape)} | numbers

    @staticmethod
    def restored(stored: dict[str, Any]) -> Features:
        """What `stored` gave; raises UsageError if that encoder is another one by now."""
        setting, shape = stored["name"], tuple(stored["shape"])
        made = Features(
            setting, shape, digest(setting, shape), torch.tensor(stored["mean"]), torch.tensor(stored["deviation"])
        )
        require_same(made.describe(), stored)
        return made


def require_same(here: dict[str, Any] | None, there: dict[str, Any]) -> None:
    """Raises UsageError unless the encoder of a record, as `describe` tells of it, is the one that is here."""
    if here is None or here["digest"] != there["digest"]:
        raise UsageError(
            f"the encoder {there['name']} is another one than it was (its weights have the digest "
            f"{here and here['digest']}, and had {there['digest']}); install the package, or put the files, of then"
        )


def network(setting: str, shape: tuple[int, ...]) -> nn.Module:
    """The frozen network of an encoder for raw inputs of a shape; one a process."""
    return _loaded(setting, shape)[1]


def digest(setting: str, shape: tuple[int, ...]) -> str:
    """What tells an encoder from others: its kind, its options and its weights."""
    return digest_of(*_loaded(setting, shape))


@lru_cache(maxsize=2)
def _loaded(setting: str, shape: tuple[int, ...]) -> tuple[Encoder, nn.Module]:
    encoder = build(setting)
    with seeded(0, "encoder"):  # what initialisers draw before weights are loaded must move no other stream
        return encoder, encoder.network(shape).requires_grad_(False).eval()


@lru_cache(maxsize=2)
def _placed(setting: str, shape: tuple[int, ...], device: str) -> nn.Module:
    net = network(setting, shape)
    return net if device == "cpu" else copy.deepcopy(net).to(device)


def encoded(setting: str, x: Tensor) -> Tensor:
    """The features [N, D] of raw inputs x [N, ...], from where they were kept if they were, else made and kept.

    On CPUs, in pieces of a fixed size with one thread each: their number changes no bit.
    """
    shape = tuple(x.shape[1:])
    net = network(setting, shape)
    with reproducible("cpu", 1):
        probe = _checked(setting, _piece(net, x[:PROBED]))
        key = cache.digest(digest(setting, shape), f"{x.dtype} {list(x.shape)}", cache.octets(x), cache.octets(probe))
        place = cache.folder()
        path = place / f"{key}.safetensors" if place else None
        found = cache.kept(path) if path else None
        if found is None:
            found = _checked(setting, _made(net, x, probe.shape[1]))
            if path:
                cache.keep(path, found)
    return found


def _made(net: nn.Module, x: Tensor, width: int) -> Tensor:
    out = torch.empty(len(x), width)

    def fill(start: int) -> None:
        out[start : start + AT_ONCE] = _piece(net, x[start : start + AT_ONCE])

    # A thread begins with settings of its own.
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(fill, range(0, len(x), AT_ONCE)):
            pass
    return out


@torch.no_grad()
def _piece(net: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = net(x)
    return found


def _checked(setting: str, found: Tensor) -> Tensor:
    if found.dim() != 2 or found.dtype != torch.float32 or not found.isfinite().all():
        raise UsageError(
            f"the encoder {setting} gives {found.dtype} of shape {list(found.shape)}, of which "
            f"{int(found.isfinite().logical_not().sum())} are not finite; expected finite torch.float32 [N, D]"
        )
    return found
