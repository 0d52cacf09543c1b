"""Networks that users make, of any `nn.Module`: how they are made, and where they have a head.

Methods take a network to be `head(body(x))`. In somebody's own module the head stands somewhere inside; `Headed` moves
it out, and everything that leaves a run (`bare`, `outward`) is as its maker has it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError, unknown
from fedloom.letters import with_article
from fedloom.random import seeded
from fedloom.user_networks import network_at

V = TypeVar("V")
ROWS = 2  # of the inputs by which a network is looked at: BatchNorm trains on no single one


class Headed(nn.Module):
    """A module of somebody's own, cut in two: the module `at` is its `head`, and the `body` is all before it."""

    def __init__(self, net: nn.Module, at: str) -> None:
        super().__init__()
        self.at = at
        self.body = net
        self.head = net.get_submodule(at)
        put(net, at, nn.Identity())

    def parts(self) -> dict[str, nn.Module]:
        """What runs one after the other."""
        return {"body": self.body, "head": self.head}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def bare(net: nn.Module) -> nn.Module:
    """A network as its maker has it: a copy with the head where it was, if that was moved out; else the same object."""
    if not isinstance(net, Headed):
        return net
    own = copy.deepcopy(net)
    put(own.body, own.at, own.head)
    return own.body


def outward(net: nn.Module, entries: Mapping[str, V]) -> dict[str, V]:
    """Entries by their names in a network, by those in the network as its maker has it."""
    if not isinstance(net, Headed):
        return dict(entries)
    parts = ((*name.partition("."), value) for name, value in entries.items())
    return {rest if part == "body" else f"{net.at}.{rest}": value for part, _, rest, value in parts}


def make(text: str, shape: tuple[int, ...], outputs: int, vocabulary: int) -> nn.Module:
    """A fresh network of somebody's own: a copy of a module, or what a class or function gives.

    These are called with what they have parameters for: `shape` (of one input), `outputs` or `num_classes`, and
    `vocabulary`. Raises UsageError where there is none of this name, or it cannot be made.
    """
    made = network_at(text)
    if isinstance(made, nn.Module):
        return copy.deepcopy(made)
    offered = {"shape": shape, "outputs": outputs, "num_classes": outputs, "vocabulary": vocabulary}
    try:
        parameters = dict(inspect.signature(made).parameters)
    except (TypeError, ValueError):
        parameters = {}
    taken = {name: value for name, value in offered.items() if name in parameters}
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)
    lacking = [name for name, p in parameters.items() if name not in taken and p.default is p.empty and p.kind in plain]
    if lacking:
        raise UsageError(
            f"model={text}: {lacking[0]} is a parameter without a value; a network's class or function is called with "
            f"{', '.join(offered)} alone, as far as it has these; give the others defaults, or give a module that is "
            "made"
        )
    try:
        net = made(**taken)
    except Exception as error:
        raise UsageError(f"model={text} cannot be made ({type(error).__name__}: {error})") from error
    if not isinstance(net, nn.Module):
        raise UsageError(f"model={text} gives {with_article(type(net).__name__)}; expected an nn.Module")
    return net


def fitted(net: nn.Module, head: str | None, x: Tensor, outputs: int, what: str, dense: bool = False) -> nn.Module:
    """A network as methods take it, `head(body(x))`, where `head` names its head or it is found; else as it is.

    A head is found where a Linear, or a convolution, makes the network's outputs. `x` are inputs as the network gets
    them. Raises UsageError where it cannot read them, does not give `outputs` numbers a row (`dense`: a pixel), or the
    head that is named is none.
    """
    require(net, x, (outputs, *x.shape[2:]) if dense else (outputs,), what)
    halves = dict(net.named_children())
    if head is None and [*halves] == ["body", "head"] and _alike(net, nn.Sequential(*halves.values()), x):
        return net
    at = head or last(net, x)
    if at is None:
        return net
    if head is not None and at not in (names := [name for name, _ in net.named_modules() if name]):
        raise unknown(f"head of {what}", at, names)
    own = net.get_submodule(at)
    entries = list(own.parameters())
    inside = {id(p) for name, p in net.named_parameters(remove_duplicate=False) if not name.startswith(f"{at}.")}
    if entries and not any(id(p) in inside for p in entries) and _alike(net, Headed(copy.deepcopy(net), at), x):
        return Headed(net, at)
    if head is None:
        return net
    if not entries:
        raise UsageError(f"head={head}: that part of {what} has no parameters; name the layer that makes its outputs")
    raise UsageError(
        f"head={head}: the outputs of {what} are not what {head} makes of the rest (something comes behind it, or "
        "it is run, or has weights, elsewhere too); name the module that makes the outputs, or leave head out"
    )


@torch.no_grad()
def _alike(net: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Whether two networks give the same outputs, in evaluation and in training."""
    for training in (False, True):
        found = []
        for one in (net, other):
            tried = copy.deepcopy(one).train(training)  # running statistics stay as they are
            with seeded(0, "model", "looked at"):
                try:
                    found.append(tried(x))
                except Exception:  # noqa: BLE001 - whatever somebody's own module raises
                    return False
        if not torch.equal(*found):
            return False
    return True


@torch.no_grad()
def require(net: nn.Module, x: Tensor, outputs: tuple[int, ...], what: str) -> None:
    """Raises UsageError unless a network gives outputs of this shape for each row."""
    training = net.training
    try:
        out = net.eval()(x)
    except Exception as error:
        raise UsageError(
            f"{what} cannot read these data: inputs are {x.dtype} {['rows', *x.shape[1:]]} "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        net.train(training)
    if not isinstance(out, Tensor):
        raise UsageError(f"{what} gives {with_article(type(out).__name__)}; expected a tensor of outputs")
    if tuple(out.shape) != (len(x), *outputs):
        many = "scores of as many classes as masks have, for every pixel" if len(outputs) > 1 else ""
        raise UsageError(
            f"{what} gives outputs {['rows', *out.shape[1:]]}, and these data need {['rows', *outputs]}: "
            f"{many or 'as many as there are classes, labels, or amounts'}"
        )


@torch.no_grad()
def last(net: nn.Module, x: Tensor) -> str | None:
    """The name of the Linear, or convolution, whose output is the network's; None of none, or if the network is one."""
    made: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: made.__setitem__(name, out))
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name
    ]
    training = net.training
    try:
        out = net.eval()(x)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return next((name for name, one in made.items() if one is out), None)


def put(net: nn.Module, at: str, module: nn.Module) -> None:
    """Makes a module the part of a network at a place."""
    owner, _, leaf = at.rpartition(".")
    setattr(net.get_submodule(owner), leaf, module)
