"""Weights of a network from a file: safetensors, or what PyTorch's `torch.save(net.state_dict(), ...)` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError
from fedloom.nets.own import outward
from fedloom.vector import Layout

SHOWN = 3  # names that an error tells


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU. Nothing in it is executed.

    Raises:
        UsageError: there is no such file, or it is no file of tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no file of initial weights {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: object = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - it unpickles tensors only
    except Exception as error:
        raise UsageError(
            f"cannot read initial weights from {path} ({type(error).__name__}); expected a .safetensors file, or what "
            "torch.save(net.state_dict(), path) writes"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()):
        kinds = f"the entries {_shown(list(found))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise UsageError(f"{path} has {kinds}, which are no tensors by name; save net.state_dict() alone")
    return dict(found)


def put(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Makes these the weights of a network: all that are trained, and what else of it they name.

    Raises:
        UsageError: a trained parameter or a running statistic is not among them, one of them is not of the network, or
            of another shape.
    """
    own = outward(net, net.state_dict(keep_vars=True))
    needed = {name for name in outward(net, dict.fromkeys(Layout.of(net).names)) if name in own}
    shapes = [
        f"{name} is {list(one.shape)} there, {list(own[name].shape)} here"
        for name, one in weights.items()
        if name in own and one.shape != own[name].shape
    ]
    lacking, strange = sorted(needed - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [f"they lack {_shown(lacking)}"] if lacking else []
    wrong += [f"the network has no {_shown(strange)}"] if strange else []
    wrong += [_shown(shapes, "; ")] if shapes else []
    if wrong:
        raise UsageError(
            f"the initial weights do not fit the network ({'; '.join(wrong)}); take the model that they are of, or "
            "rename them as in it"
        )
    with torch.no_grad():
        for name, one in weights.items():
            own[name].copy_(one)


def _shown(names: list[str], by: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return by.join(map(str, names[:SHOWN])) + more
