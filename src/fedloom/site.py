"""What the nodes of one process share: the task, its seed, and a bench for each network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom import message
from fedloom.bench import Bench, Joint
from fedloom.errors import UsageError
from fedloom.nets.weights import put
from fedloom.random import seeded
from fedloom.scoring import beside
from fedloom.task import Task
from fedloom.vector import Vector

if TYPE_CHECKING:
    from fedloom.calls import Layer
    from fedloom.descent import Meeting
    from fedloom.message import V


class Site:
    """Where nodes live: the task, a bench for each network, and the seed of the experiment, in one process.

    `layers` wrap what clients do, the first innermost. A `blind` site judges nothing on test data. `networks` gives
    those of a method's own by name, which are known here before anything else: `nets`. `needs` are what the method
    declares to need of the task, and `measures` are those that the run asks for beside the task's own. `weights` are
    the initial ones of the task's network, if they are not drawn.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        device: str | torch.device = "cpu",
        buffers: str = "average",
        layers: Sequence[Layer] = (),
        blind: bool = False,
        networks: Callable[[Any], Mapping[str, Vector]] | None = None,
        needs: Sequence[str] = (),
        measures: Sequence[str] = (),
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.task = task.to(self.device)
        self.seed = seed
        self.buffers = buffers  # the policy for running statistics: average, local or ignore
        self.layers = tuple(layers)
        self.blind = blind
        self.needs = tuple(needs)
        self.wanted = tuple(measures)
        self.measures = beside(measures, task)
        self.gather: Meeting | None = None  # where clients that work together wait for each other
        with seeded(seed, "model", "init"):
            net = task.network()
            if weights is not None:
                put(net, weights)
            self.bench = Bench(net, self.device)
        self.initial = Vector(self.bench.flat.clone(), self.bench.layout, readonly=True)
        self.benches = {self.bench.layout: self.bench}
        self.viewed = (0, self.task.at(0))
        self.others: dict[tuple[Any, ...], Vector] = {}  # initial weights of the networks beside the task's
        self.changes: dict[tuple[int, str], bool] = {}  # what plug-ins changed at clients, and whether it was used
        self.joints: dict[tuple[Any, ...], Joint] = {}  # networks that were trained by one loss
        self.networks = networks
        self.weights = weights
        self.nets = dict(networks(self)) if networks else {}

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
        if isinstance(make, str):
            return self._made(("task", make, *args), ("task", make, *args), lambda: self.task.build(make))
        # Wherever the file of a class lies, its weights are these.
        return self._made((make.__module__, make.__qualname__, *args), (make.__qualname__, *args), lambda: make(*args))

    def derive(self, make: Callable[..., nn.Module], *args: Any) -> Vector:
        """The same of a network that `make(net, *args)` makes of the task's, which it gets with its initial weights."""

        def made() -> nn.Module:
            return make(self.bench.copy(self.initial.layout.views(self.initial.flat)), *args)

        key = ("derived", make.__module__, make.__qualname__, *args)
        return self._made(key, ("derived", make.__qualname__, *args), made)

    def _made(self, key: tuple[Any, ...], seeds: tuple[Any, ...], make: Callable[[], nn.Module]) -> Vector:
        if key not in self.others:
            with seeded(self.seed, "model", *map(str, seeds)):
                bench = self._known(Bench(make(), self.device))
            self.others[key] = Vector(bench.flat.clone(), bench.layout, readonly=True)
        return self.others[key]

    def _known(self, bench: Bench) -> Bench:
        """A new bench, on which vectors of its layout run from now on."""
        there = self.benches.setdefault(bench.layout, bench)
        if repr(there.net) != repr(bench.net):
            raise UsageError(
                f"two networks have the layout {bench.layout} but not the same modules: {there.net} and {bench.net}"
            )
        return bench

    def joint(self, vectors: Mapping[str, Vector]) -> Joint:
        """The networks of some vectors under their names, as one that a loss takes apart again."""
        key = tuple((name, v.layout) for name, v in vectors.items())
        if key not in self.joints:
            benches = {name: self.bench_of(v) for name, v in vectors.items()}
            self.joints[key] = Joint(benches, self.device)
            self._known(self.joints[key])
        return self.joints[key]

    def bench_of(self, w: Vector) -> Bench:
        """Where a vector runs."""
        if w.layout == self.bench.layout:
            return self.bench
        if w.layout not in self.benches:
            raise UsageError(
                f"no network here has the layout {w.layout}; the task's has {self.bench.layout}, "
                "and others are made known by `client.network(...)`, or the method's `networks`, before they are used"
            )
        return self.benches[w.layout]

    def to_device(self, value: V) -> V:
        """A value, or a message, with its tensors on this site's device, where all that crosses or is kept lies."""
        return value if self.device.type == "cpu" else message.moved(value, self.device)

    @property
    def about(self) -> tuple[Any, ...]:
        """What another process makes the same site of: `Site(*about)`."""
        whose = self.task, self.seed, str(self.device), self.buffers
        return *whose, self.layers, self.blind, self.networks, self.needs, self.wanted, self.weights
