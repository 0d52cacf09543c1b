"""Where clients that work together wait for each other, and take their gradients as one.

Every client function runs in a greenlet of its own and parks in `descend` or `grad`. Once all have parked, jobs that
fit each other run together, with the clients as a batch dimension, and each function goes on with its own result. A
client's batches, and their order, are those it would draw alone; results agree to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedloom.bench import Bench
from fedloom.calls import Call, Outcome
from fedloom.descent import Descent, Loss, Slope, Wrapped
from fedloom.engines.batched import Descents, split, stacked
from fedloom.engines.perform import perform
from fedloom.engines.traced import UNFIT, Traced
from fedloom.message import Value
from fedloom.method import Method
from fedloom.node import Node
from fedloom.random import drawn_so_far, go_on
from fedloom.site import Site
from fedloom.task import Batch
from fedloom.vector import Vector

# Modules whose training is no pure function of parameters and batch, or that torch.func does not know.
ALONE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RNNBase)


@dataclass(frozen=True)
class Parked:
    """A client's job, and the client that waits for it."""

    node: Node
    job: Descent | Slope

    def alone(self) -> Any:
        """The job's result without the others."""
        site, arguments = self.node.site, {field.name: getattr(self.job, field.name) for field in fields(self.job)}
        meeting, site.gather = site.gather, None
        try:
            return (Node.descend if isinstance(self.job, Descent) else Node.grad)(self.node, **arguments)
        finally:
            site.gather = meeting


class Gather:
    """The meeting place of one site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.suited: dict[Bench, bool] = {}  # which networks train as a batch
        self.slopes: dict[Any, Callable[..., Any]] = {}
        self.unbatched: set[Any] = set()  # losses that had no batched form when it was tried

    def fits(self, bench: Bench) -> bool:
        """Whether a network trains the same with many clients as a batch dimension."""
        if bench not in self.suited:
            self.suited[bench] = not any(isinstance(module, ALONE) for module in bench.net.modules())
        return self.suited[bench]

    def together(
        self, method: Method, call: Call, clients: Iterable[tuple[int, Mapping[str, Value], Mapping[str, Value]]]
    ) -> list[Outcome]:
        """The outcomes of `clients` (id, state, message), in their order."""
        lets = [greenlet(lambda c=c: perform(method, self.site, c[1], call, c[0], c[2])) for c in clients]
        done: dict[int, Outcome] = {}
        waiting: dict[int, Parked] = {}
        ours = drawn_so_far()  # as one client's stream begins where another waits, the last to end returns to neither
        self.site.gather = self
        try:
            for k, let in enumerate(lets):
                self._note(k, let, let.switch(), done, waiting)
            while waiting:
                parked, waiting = waiting, {}
                for k, result in self._run(parked).items():
                    self._note(k, lets[k], lets[k].switch(result), done, waiting)
        finally:
            self.site.gather = None
            go_on(ours)
        return [done[k] for k in range(len(lets))]

    def _note(self, k: int, let: Any, said: Any, done: dict[int, Outcome], waiting: dict[int, Parked]) -> None:
        if let.dead:
            done[k] = said
        else:
            waiting[k] = said

    def descend(self, node: Node, job: Descent) -> tuple[Vector, int]:
        """Parks a client until its descent is done."""
        result: tuple[Vector, int] = self._park(Parked(node, job))
        return result

    def grad(self, node: Node, job: Slope) -> Vector:
        """Parks a client until its gradient is taken."""
        result: Vector = self._park(Parked(node, job))
        return result

    def _park(self, parked: Parked) -> Any:
        if not self.fits(self.site.bench_of(parked.job.w)):
            return parked.alone()
        mine = drawn_so_far()  # torch's global generators belong to whoever runs
        hub = getcurrent().parent
        assert hub is not None  # a client function runs in a greenlet of `together`
        result = hub.switch(parked)
        go_on(mine)
        return result

    def _run(self, parked: Mapping[int, Parked]) -> dict[int, Any]:
        """Results of all parked jobs, in the order of the clients."""
        groups: dict[Any, list[int]] = {}
        for k, one in parked.items():
            groups.setdefault(_kind(one), []).append(k)
        results: dict[int, Any] = {}
        for members in groups.values():
            results |= zip(members, self._group([parked[k] for k in members]), strict=True)
        return dict(sorted(results.items()))

    def _group(self, group: list[Parked]) -> list[Any]:
        return (self.batched(group) if len(group) > 1 else None) or [one.alone() for one in group]

    def batched(self, group: list[Parked]) -> list[Any] | None:
        """The results of jobs of one kind, taken together; None if their loss or the network has no batched form."""
        loss, bench = _identity(group[0].job.loss), self.site.bench_of(group[0].job.w)
        if self.fits(bench) and (loss, bench) not in self.unbatched:
            before = [
                (one.node.draws.copy(), {name: list(log) for name, log in one.node.logs.items()}) for one in group
            ]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # torch.func warns where it falls back to a loop
                    return (
                        self._descents(group, bench)
                        if isinstance(group[0].job, Descent)
                        else self._slopes(group, bench)
                    )
            except UNFIT:
                # This loss or this network has no batched form, or the job is wrong: alone it works, or says what is.
                self.unbatched.add((loss, bench))
                for one, (draws, logs) in zip(group, before, strict=True):
                    one.node.draws, one.node.logs = draws, logs
        return None

    def _slopes(self, group: list[Parked], bench: Bench) -> list[Vector]:
        jobs: list[Any] = [one.job for one in group]
        flat = torch.stack([job.w.flat for job in jobs])
        batch = stacked([job.batch for job in jobs])
        chosen = bench.choose(jobs[0].only)
        names = tuple(_columns(group[0]))
        gradient, values = self._slope(bench, jobs[0].loss, chosen, names)(*split(bench, flat, chosen), *batch)
        out = torch.zeros_like(flat)
        for place, g in zip(chosen, gradient, strict=True):
            bench.layout.entry(out, place).copy_(g)
        for one, value in zip(group, values, strict=True):
            one.node.meter(1, batch[1].shape[1])
            one.node.log(loss=value)
        return [Vector(row, job.w.layout) for row, job in zip(out, jobs, strict=True)]

    def _descents(self, group: list[Parked], bench: Bench) -> list[tuple[Vector, int]]:
        jobs: list[Any] = [one.job for one in group]
        names = tuple(_columns(group[0]))
        slope = self._slope(bench, jobs[0].loss, bench.choose(jobs[0].only), names)
        return Descents([one.node for one in group], jobs, bench, slope).run()

    def _slope(self, bench: Bench, loss: Loss, chosen: Sequence[int], names: tuple[str, ...]) -> Callable[..., Any]:
        """Gradients and losses of K clients: `batched.Slopes`; `names` are those of the columns beside x and y."""
        key = (bench, _identity(loss), tuple(chosen), names)
        if key not in self.slopes:
            layout, inside = bench.layout, set(chosen)
            moving = [f"net.{layout.names[p]}" for p in chosen]
            still = [f"net.{name}" for p, name in enumerate(layout.names) if p not in inside]
            module = _Losing(bench.net, loss, names)

            def value(here: Sequence[Tensor], there: Sequence[Tensor], *batch: Any) -> Tensor:
                weights = dict(zip([*moving, *still], [*here, *there], strict=True))
                out: Tensor = functional_call(module, weights, batch)
                return out

            if len(self.slopes) > 16:  # losses that close over something new every round
                self.slopes.clear()
            slope = vmap(grad_and_value(value))
            # The task's own loss is pure; what a method's loss closes over may change from call to call.
            own = getattr(loss, "__self__", None) is self.site.viewed[1]
            self.slopes[key] = Traced(slope) if own else slope
        return self.slopes[key]


class _Losing(nn.Module):
    """A network and a loss as one module, so that a loss may use the network as it likes."""

    def __init__(self, net: nn.Module, loss: Loss, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.names = names

    def forward(self, x: Tensor, y: Tensor, columns: Sequence[Tensor]) -> Tensor:
        return self.loss(self.net, Batch(x, y, dict(zip(self.names, columns, strict=True))))


def _columns(one: Parked) -> list[str]:
    """The names of the columns beside x and y that a job's batches have."""
    batches = one.job.batch if isinstance(one.job, Slope) else one.job.data or one.node.data
    return sorted(batches.metadata)


def _kind(one: Parked) -> Any:
    """Jobs of one kind fit each other."""
    job = one.job
    if isinstance(job, Slope):
        shapes = tuple((name, job.batch[name].shape) for name in _columns(one))
        return (job.w.layout, _identity(job.loss), job.only, job.batch.x.shape, job.batch.y.shape, shapes)
    correct = "vector" if isinstance(job.correct, Vector) else "function" if job.correct else None
    rule = (job.lr, job.optimizer, job.weight_decay, job.clip, job.only)
    return (job.w.layout, _identity(job.loss), rule, correct, *_columns(one))


def _identity(loss: Callable[..., Any]) -> Any:
    """What tells losses apart: a bound method is made anew at every access, its object and function are not."""
    if isinstance(loss, Wrapped):
        return _identity(loss.wrap), _identity(loss.loss)
    return id(getattr(loss, "__self__", None)), getattr(loss, "__func__", loss)
