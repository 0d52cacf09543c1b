"""Networks whose numbers lie in one flat tensor, so that a vector is loaded by one copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.descent import Only
from fedloom.errors import UsageError
from fedloom.vector import Layout, Vector


class Bench:
    """A network whose parameters and float buffers are views of one flat tensor, used by all nodes of a process.

    Loading a model is one copy, and reading the result is another; there is no state dict on the way.
    """

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        self.net = net.to(device)
        self.layout = Layout.of(net)
        self.flat = Vector.of(net).flat
        self.views = self.layout.views(self.flat)
        self.params = [param for param in net.parameters() if param.requires_grad]
        self.modules = list(net.modules())
        self.chosen: tuple[Only, list[int]] | None = None  # what `choose` was last asked for, and gave
        # What counts (BatchNorm's batches) is of this process, and no part of a model: copies have it as it began.
        counters = {name: value for name, value in self.net.named_buffers() if not value.is_floating_point()}
        self.counters = {name: value.clone() for name, value in counters.items()}
        for param, view in zip(self.params, self.views, strict=False):
            param.data = view
        for name, view in zip(self.layout.names[len(self.params) :], self.views[len(self.params) :], strict=True):
            owner, _, leaf = name.rpartition(".")
            net.get_submodule(owner).register_buffer(leaf, view)

    @property
    def statistics(self) -> list[tuple[Bench, slice]]:
        """Whose running statistics lie where in the flat tensor: its own, behind the parameters."""
        return [(self, slice(self.layout.split, self.layout.size))]

    def copy(self, entries: Sequence[Tensor], into: nn.Module | None = None) -> nn.Module:
        """A network of its own that holds these entries of the layout; what is frozen in it is shared, not copied.

        `into`: a copy that was made before, which holds them from now on.
        """
        trained = set(map(id, self.params))
        frozen = {id(param): param for param in self.net.parameters() if id(param) not in trained}
        net = copy.deepcopy(self.net, frozen) if into is None else into
        held = self.layout.held(net)
        for tensor, entry in zip(held, entries, strict=True):
            tensor.data = entry.detach().clone()
        for param in held[: self.layout.parameters]:
            param.requires_grad_(True)
        for name, value in self.counters.items():
            net.get_buffer(name).data = value.clone()
        return net

    def load(self, w: Vector) -> None:
        if w.layout != self.layout:
            raise UsageError(f"this network has the layout {self.layout}, the vector {w.layout}")
        self.flat.copy_(w.flat)

    def train(self, mode: bool) -> None:
        """Puts the network into training or evaluation mode, if any part of it is in the other."""
        # To set the mode of every module takes longer than a small network's forward pass; to look at it does not.
        if any(module.training is not mode for module in self.modules):
            self.net.train(mode)

    def choose(self, only: Only) -> list[int]:
        """Places of the parameters to train: all, or those whose names match the pattern, or one of those, `only`."""
        if self.chosen and self.chosen[0] == only:
            return self.chosen[1]
        patterns = [only] if isinstance(only, str) else only
        places = range(len(self.params)) if patterns is None else self.layout.matching(patterns)
        chosen = [p for p in places if p < len(self.params)]
        for place, param in enumerate(self.params):
            param.requires_grad_(only is None or place in chosen)
        self.chosen = only, chosen
        return chosen

    def gradient(self, entries: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        """The flat tensor with the entries of the parameters at the places `chosen`, and zeros elsewhere."""
        if len(chosen) == len(self.params):
            stored = [Layout.stored(entry, entry.dim()) for entry in entries]
            return torch.cat([*stored, torch.zeros_like(self.flat[self.layout.split :])])
        flat = torch.zeros_like(self.flat)
        for place, entry in zip(chosen, entries, strict=True):
            self.layout.entry(flat, place).copy_(entry)
        return flat

    def parts(self, v: Vector, chosen: Sequence[int]) -> list[Tensor]:
        """The entries of a correction for the parameters at the places `chosen`."""
        its, mine = ((x.names[: x.parameters], x.shapes[: x.parameters]) for x in (v.layout, self.layout))
        if its != mine:
            raise UsageError(f"a correction needs the layout of the network's parameters {self.layout}, got {v.layout}")
        views = v.layout.views(v.flat)
        return [views[p] for p in chosen]


class Joint(Bench):
    """Several networks by name under one loss: copies in an `nn.ModuleDict`, whose parameters are `NAME.parameter`.

    Their vectors become one and come apart again; whatever trains a network trains all of them at once.
    """

    def __init__(self, benches: Mapping[str, Bench], device: torch.device) -> None:
        for name in benches:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise UsageError(
                    f"networks in one loss are told apart by name, and {name!r} cannot be one; take another"
                )
        super().__init__(nn.ModuleDict({name: bench.copy(bench.views) for name, bench in benches.items()}), device)
        self.benches = dict(benches)

    @property
    def statistics(self) -> list[tuple[Bench, slice]]:
        found, start = [], self.layout.split
        for bench in self.benches.values():
            held = bench.layout.size - bench.layout.split
            found.append((bench, slice(start, start + held)))
            start += held
        return found

    def join(self, vectors: Mapping[str, Vector]) -> Vector:
        """One vector of several: each in the layout of its network, or else that of the networks' parameters."""
        if vectors.keys() != self.benches.keys():
            raise UsageError(f"expected a vector for each of {', '.join(self.benches)}, got {', '.join(vectors)}")
        own = [(bench.layout, vectors[name]) for name, bench in self.benches.items()]
        for layout, v in own:
            if v.params.layout != layout.part(range(layout.parameters)):
                raise UsageError(f"this network has the layout {layout}, the vector {v.layout}")
        params = [v.flat[: layout.split] for layout, v in own]
        if any(v.layout != layout for layout, v in own):
            return Vector(torch.cat(params), self.layout.part(range(self.layout.parameters)))
        return Vector(torch.cat([*params, *(v.flat[layout.split :] for layout, v in own)]), self.layout)

    def correction(self, correct: Any) -> Any:
        """A correction of the networks by name, or a function of their vectors that gives one, as one of the whole."""
        if callable(correct):
            return lambda v: self.join(correct(self.split(v)))
        return correct if correct is None else self.join(correct)

    def split(self, v: Vector) -> dict[str, Vector]:
        """The vectors that `join` made one of."""
        found, start = {}, 0
        for (name, bench), (_, held) in zip(self.benches.items(), self.statistics, strict=True):
            stop = start + bench.layout.split
            found[name] = Vector(torch.cat([v.flat[start:stop], v.flat[held]]), bench.layout)
            start = stop
        return found
