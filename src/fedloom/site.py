"""What the nodes of one process share: the task, its seed, and a bench for each network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom import message
from fedloom.descent import Only
from fedloom.errors import UsageError
from fedloom.random import seeded
from fedloom.task import Task
from fedloom.vector import Layout, Vector

if TYPE_CHECKING:
    from fedloom.calls import Layer
    from fedloom.descent import Meeting
    from fedloom.message import V


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
        for param, view in zip(self.params, self.views, strict=False):
            param.data = view
        for name, view in zip(self.layout.names[len(self.params) :], self.views[len(self.params) :], strict=True):
            owner, _, leaf = name.rpartition(".")
            net.get_submodule(owner).register_buffer(leaf, view)

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


class Site:
    """Where nodes live: the task, a bench for each network, and the seed of the experiment, in one process.

    `layers` wrap what clients do, the first innermost. A `blind` site judges nothing on test data.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        device: str | torch.device = "cpu",
        buffers: str = "average",
        layers: Sequence[Layer] = (),
        blind: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.task = task.to(self.device)
        self.seed = seed
        self.buffers = buffers  # the policy for running statistics: average, local or ignore
        self.layers = tuple(layers)
        self.blind = blind
        self.gather: Meeting | None = None  # where clients that work together wait for each other
        with seeded(seed, "model", "init"):
            self.bench = Bench(task.network(), self.device)
        self.initial = Vector(self.bench.flat.clone(), self.bench.layout, readonly=True)
        self.benches = {self.bench.layout: self.bench}
        self.viewed = (0, self.task.at(0))
        self.others: dict[tuple[Any, ...], Vector] = {}  # initial weights of the networks beside the task's
        self.changes: dict[tuple[int, str], bool] = {}  # what plug-ins changed at clients, and whether it was used

    def note_change(self, plugin: object, what: str, used: bool) -> None:
        """Keeps that a plug-in changed something at a client (`data`, `loss`), and whether anything asked for it."""
        self.changes[id(plugin), what] = self.changes.get((id(plugin), what), False) or used

    def task_at(self, round: int) -> Task:
        """The task as it is in a round; one object a round, so that clients' losses are one function."""
        if round != self.viewed[0]:
            self.viewed = round, self.task.at(round)
        return self.viewed[1]

    def network(self, make: str | Callable[..., nn.Module], *args: Any) -> Vector:
        """The initial weights of another network, on which vectors of their layout run from now on."""
        key = ("task", make) if isinstance(make, str) else (make.__module__, make.__qualname__)
        if (*key, *args) not in self.others:
            named = (
                key if isinstance(make, str) else key[1:]
            )  # wherever the file of a class lies, its weights are these
            with seeded(self.seed, "model", *map(str, (*named, *args))):
                bench = Bench(self.task.build(make) if isinstance(make, str) else make(*args), self.device)
            there = self.benches.setdefault(bench.layout, bench)
            if repr(there.net) != repr(bench.net):
                raise UsageError(
                    f"two networks have the layout {bench.layout} but not the same modules: {there.net} and {bench.net}"
                )
            self.others[*key, *args] = Vector(bench.flat.clone(), bench.layout, readonly=True)
        return self.others[*key, *args]

    def bench_of(self, w: Vector) -> Bench:
        """Where a vector runs."""
        if w.layout == self.bench.layout:
            return self.bench
        if w.layout not in self.benches:
            raise UsageError(
                f"no network here has the layout {w.layout}; the task's has {self.bench.layout}, "
                "and others are made known by `client.network(...)` before they are used"
            )
        return self.benches[w.layout]

    def to_device(self, value: V) -> V:
        """A value, or a message, with its tensors on this site's device, where all that crosses or is kept lies."""
        return value if self.device.type == "cpu" else message.moved(value, self.device)

    @property
    def about(self) -> tuple[Any, ...]:
        """What another process makes the same site of: `Site(*about)`."""
        return self.task, self.seed, str(self.device), self.buffers, self.layers, self.blind
