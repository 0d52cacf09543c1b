"""Somebody who runs networks: loads vectors into them, and asks them for scores, features and measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedloom import encoding, scoring
from fedloom.bench import Bench
from fedloom.errors import UsageError
from fedloom.nets import cut
from fedloom.site import Site
from fedloom.task import Data, Task, by_name
from fedloom.vector import Layout, Vector

STATISTICS = "_running_statistics"  # where a node keeps them under the policy `local`; underscored, so no clash


class Evaluator:
    """Somebody who runs networks at a site, and trains none: what a `Node` can do with a vector without a gradient."""

    def __init__(self, site: Site, round: int) -> None:
        self.site = site
        self.task = site.task_at(round)
        self.round = round

    @property
    def memory(self) -> MutableMapping[str, Any]:
        """What the node keeps by name beyond a call."""
        raise NotImplementedError

    @property
    def initial(self) -> Vector:
        """The network's initial weights: the same at every node of a run, from the shared seed, at no bytes."""
        return self.site.initial

    @property
    def layout(self) -> Layout:
        return self.site.bench.layout

    @property
    def nets(self) -> Mapping[str, Vector]:
        """The initial weights of the networks that the method has beside the task's, by name (`Method.networks`)."""
        return self.site.nets

    def network(self, make: str | Callable[..., nn.Module], *args: Any) -> Vector:
        """Another network than the task's: its initial weights, alike at every node of a run, at no bytes.

        `make` is a name that the task builds (`mlp:32`), or a module-level function or class called with `args`. From
        then on `grad`, `descend`, `net`, `features` and `predict` take vectors of its layout, at this node's place.
        The same arguments give the same network again; of a name that the task builds, other `args` give other initial
        weights. What every node needs belongs into `Method.networks`, which is asked before anything else.
        """
        return self.site.network(make, *args)

    def derive(self, make: Callable[..., nn.Module], *args: Any) -> Vector:
        """A network made from the task's own, as `network` gives one: `make(net, *args)`, a module-level function.

        It gets the task's network with its initial weights, frozen parts shared, and gives a module made from it: with
        a head more, with adapters, with fewer layers. What is learned in it requires gradients; the rest is frozen.
        """
        return self.site.derive(make, *args)

    def names_of(self, *kinds: type[nn.Module]) -> tuple[str, ...]:
        """Names of the parameters and float buffers that belong directly to modules of these types."""
        owners = {name for name, module in self.site.bench.net.named_modules() if isinstance(module, kinds)}
        return tuple(name for name in self.layout.names if name.rpartition(".")[0] in owners)

    def net(self, w: Vector, into: nn.Module | None = None) -> nn.Module:
        """A network of its own that holds `w`: in evaluation mode, without gradients.

        `Vector.of(net, w.layout)` reads it back. What is frozen in it is shared, not copied. Running statistics that
        the node keeps under the policy `local` are in it in place of those of `w`. `into`: one that it gave for another
        vector of this layout, and that holds `w` from now on: to make one takes longer than to fill it.
        """
        return self.site.bench_of(w).copy(self._entries(w), into).requires_grad_(False).eval()

    def scores(self, w: Vector, x: Tensor) -> Tensor:
        """The outputs of the network `w` for inputs [B, ...], in evaluation mode, differentiable in its parameters."""
        return self._run(w, lambda net: net(x), train=False)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where the task's network can be cut, from the inputs on; none of one that runs no parts one after another."""
        return tuple(cut.cuts(self.site.bench.net))

    def states_shape(self, at: str) -> tuple[int, ...]:
        """The shape of one input's state at a cut of the task's network."""
        return tuple(self.states(self.initial, self.site.task.blank(), at).shape[1:])

    def states(self, w: Vector, x: Tensor, at: str, train: bool = False) -> Tensor:
        """The states [B, ...] of the network `w` at a cut, for inputs [B, ...], differentiable in both.

        `at` is one of `cuts`. In evaluation mode, or in training mode, where batches normalize themselves, and no
        running statistics move. It is a forward pass, which no meter counts: whoever trains by it takes the gradient
        by `grad`, `descend` or `input_grad`, of a loss that uses `nets.cut`, or meters it.
        """
        return self._run(w, lambda net: cut.states(net, x, at), train)

    def resume(self, w: Vector, h: Tensor, at: str, until: str | None = None, train: bool = False) -> Tensor:
        """What the network `w` makes of its states [B, ...] at a cut: scores, or states at a later cut, `until`.

        `resume(w, states(w, x, at), at)` are the scores of x. Modes and gradients as in `states`.
        """
        return self._run(w, lambda net: cut.resume(net, h, at, until), train)

    def features(self, w: Vector, x: Tensor) -> Tensor:
        """What the body of the network `w` makes of inputs [B, ...]: features [B, D], in evaluation mode."""
        with torch.no_grad():
            features: Tensor = self._loaded(w).net.get_submodule("body")(x)
        return features

    def judge(self, judged: Any, data: Data) -> dict[str, float]:
        """The task's measures, on data, of what a method is judged by.

        That is a model, a function from inputs to scores [B, C], or a message value, where the problem judges values;
        or a dict of several by name. Then the first is the main one, whose measures stand under their own names, and
        those of each, the first included, stand as `accuracy@NAME`.
        """
        if not isinstance(judged, Mapping):
            return self._measures(judged, data)
        each = {name: self._measures(one, data) for name, one in by_name(judged, "what is judged").items()}
        return next(iter(each.values())) | {
            f"{measure}@{name}": value
            for name, found in each.items()
            for measure, value in found.items()
            if measure != "n"
        }

    def _measures(self, judged: Any, data: Data) -> dict[str, float]:
        """The task's measures of one model, function or value."""
        values = self.task.judges_values
        if values and not callable(judged):
            encoding.check({"value": judged}, "what is judged")
        elif values or not (isinstance(judged, Vector) or callable(judged)):
            raise UsageError(
                f"what is judged is a {type(judged).__name__}; a {type(self.task).__name__} judges "
                + ("message values, such as a tensor" if values else "a Vector, or a function from inputs to scores")
                + "; several of them are given as {name: ...}"
            )
        with torch.no_grad():
            taken = self._loaded(judged).net if isinstance(judged, Vector) and not values else judged
            found = _measured(self.task, self.task.judge(taken, data))
            return found | scoring.measured(self.site.measures, self.task, taken, data)

    def _run(self, w: Vector, use: Callable[[nn.Module], Tensor], train: bool) -> Tensor:
        """What `use` makes of the network `w`, differentiable in its parameters; no running statistics move."""
        bench, split = self.site.bench_of(w), w.layout.parameters
        bench.train(train)
        entries = self._entries(w)
        if train:
            entries[split:] = [statistic.clone() for statistic in entries[split:]]
        names = [f"net.{name}" for name in w.layout.names]
        out: Tensor = functional_call(_Used(bench.net), dict(zip(names, entries, strict=True)), (use,))
        return out

    def _loaded(self, w: Vector, train: bool = False) -> Bench:
        """The bench with `w` on it."""
        bench = self.site.bench_of(w)
        bench.load(w)
        for place, kept in self._kept(bench):
            bench.flat[place] = kept
        bench.train(train)
        return bench

    def _entries(self, w: Vector) -> list[Tensor]:
        """The entries of `w` as this node runs it, in their shapes: parameters, and statistics without history."""
        split, running = w.layout.parameters, w.flat
        if found := self._kept(self.site.bench_of(w)):
            running = w.flat.detach().clone()
            for place, kept in found:
                running[place] = kept
        statistics = w.layout.views(running)[split:]
        return [*w.layout.views(w.flat)[:split], *(statistic.detach() for statistic in statistics)]

    def _kept(self, bench: Bench) -> list[tuple[slice, Tensor]]:
        """The running statistics that the node has of a bench's networks under the policy `local`, and their places."""
        if self.site.buffers != "local":
            return []
        found = [(place, self.memory.get(self._remembered(one))) for one, place in bench.statistics]
        return [(place, kept) for place, kept in found if kept is not None]

    def _statistics(self, w: Vector) -> Tensor:
        """What becomes of the running statistics of `w` after training on the bench: the policy for buffers."""
        bench = self.site.bench_of(w)
        fresh = bench.flat[bench.layout.split :]
        if self.site.buffers == "average" or not len(fresh):
            return fresh
        if self.site.buffers == "local":
            for one, place in bench.statistics:
                if place.start < place.stop:
                    self.memory[self._remembered(one)] = bench.flat[place].clone()
        return w.flat[bench.layout.split :]

    def _remembered(self, bench: Bench) -> str:
        """The name under which the running statistics of a network are kept."""
        return STATISTICS if bench is self.site.bench else f"{STATISTICS}_{bench.layout.digest}"


class _Used(nn.Module):
    """A network whose forward pass is what somebody does with it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, use: Callable[[nn.Module], Tensor]) -> Tensor:
        return use(self.net)


def _measured(task: Task, found: Any) -> dict[str, float]:
    """What `judge` returned, as plain numbers; raises UsageError for what is no dict of numbers with `n`."""
    name = f"{type(task).__name__}.judge"
    expected = (
        'expected numbers by name, at least "n" (how many samples), as in {"n": 12, "loss": 0.3, "accuracy": 0.9}'
    )
    if not isinstance(found, Mapping) or "n" not in found:
        raise UsageError(f"{name} returned {str(found)[:80]}; {expected}")
    if marked := [key for key in found if "@" in str(key)]:
        raise UsageError(f"{name} calls a measure {marked[0]!r}; what stands behind an @ is whose measure it is")
    try:
        return {key: value if type(value) in (int, float) else float(value) for key, value in found.items()}
    except (TypeError, ValueError):
        raise UsageError(f"{name} returned {str(found)[:80]}, of which not all are numbers; {expected}") from None
