"""Inside a network: its parts in a row, the states between them, and what runs from a cut on.

A network that runs its parts one after another can be cut behind each but the last. A cut has the name of the part that
stands before it, or of the module whose last part that is: `body` is where the head begins. `nn.Sequential` has its
children for parts; any other module says by a method `parts()` what its own are, in their order, by name: modules,
which may have parts themselves, or functions. One that says nothing is a single part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from fedloom.errors import UsageError, nearest

Part = Callable[[Tensor], Tensor]


def parts(net: nn.Module) -> dict[str, Part]:
    """What a network does to its inputs, one after another, by name."""
    return _row(net, "")


def cuts(net: nn.Module) -> dict[str, int]:
    """Where a network can be cut, from the inputs on: each cut's name, and how many parts stand before it."""
    names = list(parts(net))
    found: dict[str, int] = {}
    for count, (name, following) in enumerate(pairwise(names), start=1):
        found[name] = count
        while (name := name.rpartition(".")[0]) and not following.startswith(f"{name}."):
            found[name] = count
    return found


def states(net: nn.Module, x: Tensor, at: str) -> Tensor:
    """The states [B, ...] of a network at a cut, of inputs [B, ...]: what stands before the cut makes of them."""
    return _through(net, x, 0, _place(net, at))


def resume(net: nn.Module, h: Tensor, at: str, until: str | None = None) -> Tensor:
    """What a network makes of its states [B, ...] at a cut: its scores, or its states at a later cut, `until`."""
    first, last = _place(net, at), len(parts(net)) if until is None else _place(net, until)
    if until is not None and last <= first:
        raise UsageError(f"{at!r} does not stand before {until!r}; the cuts, from the inputs on, are {_listed(net)}")
    return _through(net, h, first, last)


def _row(module: nn.Module, name: str) -> dict[str, Part]:
    own = _told(module)
    if own is None:
        return {name: module}
    found: dict[str, Part] = {}
    for child, part in own.items():
        path = f"{name}.{child}" if name else child
        found |= _row(part, path) if isinstance(part, nn.Module) else {path: part}
    return found


def _told(module: nn.Module) -> Mapping[str, Part] | None:
    """The parts that a module says it runs one after another; None of one that says nothing, or runs otherwise."""
    if type(module).forward is nn.Sequential.forward:
        return dict(module.named_children())
    order: Any = type(module).__mro__
    told, runs = (next((n for n, cls in enumerate(order) if name in vars(cls)), None) for name in ("parts", "forward"))
    if told is None or runs is None or told > runs:  # a class that runs otherwise than the one it derives from
        return None
    found: Mapping[str, Part] = module.parts()  # type: ignore[operator]
    return found


def _place(net: nn.Module, at: str) -> int:
    found = cuts(net)
    if at not in found:
        raise UsageError(
            f"the network {type(net).__name__} cannot be cut at {at!r}{nearest(at, found)}; "
            + (
                f"its cuts, from the inputs on, are {_listed(net)}"
                if found
                else "it does not say that it runs parts in a row: make it an nn.Sequential, or give it parts()"
            )
        )
    return found[at]


def _listed(net: nn.Module) -> str:
    return ", ".join(cuts(net))


def _through(net: nn.Module, x: Tensor, first: int, last: int) -> Tensor:
    for part in list(parts(net).values())[first:last]:
        x = part(x)
    return x
