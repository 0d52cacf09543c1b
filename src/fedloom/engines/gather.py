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

from fedloom.calls import Call, Outcome
from fedloom.descent import Descent, Loss, Slope, Wrapped
from fedloom.engines.perform import perform
from fedloom.engines.traced import UNFIT, Traced
from fedloom.message import Value
from fedloom.method import Method
from fedloom.node import Node
from fedloom.random import drawn_so_far, go_on
from fedloom.site import Site
from fedloom.task import Batch, Data
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
        self.fits = not any(isinstance(module, ALONE) for module in site.bench.net.modules())
        self.slopes: dict[Any, Callable[..., Any]] = {}
        self.unbatched: set[Any] = set()  # losses that had no batched form when it was tried

    def together(
        self, method: Method, call: Call, clients: Iterable[tuple[int, Mapping[str, Value], Mapping[str, Value]]]
    ) -> list[Outcome]:
        """The outcomes of `clients` (id, state, message), in their order."""
        lets = [greenlet(lambda c=c: perform(method, self.site, c[1], call, c[0], c[2])) for c in clients]
        done: dict[int, Outcome] = {}
        waiting: dict[int, Parked] = {}
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
        if not self.fits or parked.job.w.layout != self.site.bench.layout:
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
            groups.setdefault(_kind(one.job), []).append(k)
        results: dict[int, Any] = {}
        for members in groups.values():
            results |= zip(members, self._group([parked[k] for k in members]), strict=True)
        return dict(sorted(results.items()))

    def _group(self, group: list[Parked]) -> list[Any]:
        return (self.batched(group) if len(group) > 1 else None) or [one.alone() for one in group]

    def batched(self, group: list[Parked]) -> list[Any] | None:
        """The results of jobs of one kind, taken together; None if their loss or the network has no batched form."""
        loss = _identity(group[0].job.loss)
        if self.fits and loss not in self.unbatched:
            before = [
                (one.node.draws.copy(), {name: list(log) for name, log in one.node.logs.items()}) for one in group
            ]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # torch.func warns where it falls back to a loop
                    return self._descents(group) if isinstance(group[0].job, Descent) else self._slopes(group)
            except UNFIT:
                # This loss or this network has no batched form, or the job is wrong: alone it works, or says what is.
                self.unbatched.add(loss)
                for one, (draws, logs) in zip(group, before, strict=True):
                    one.node.draws, one.node.logs = draws, logs
        return None

    def _slopes(self, group: list[Parked]) -> list[Vector]:
        jobs: list[Any] = [one.job for one in group]
        flat = torch.stack([job.w.flat for job in jobs])
        x, y = torch.stack([job.batch.x for job in jobs]), torch.stack([job.batch.y for job in jobs])
        chosen = self._chosen(jobs[0].only)
        gradient, values = self._slope(jobs[0].loss, chosen)(*self._split(flat, chosen), x, y)
        out = torch.zeros_like(flat)
        for place, g in zip(chosen, gradient, strict=True):
            self.site.bench.layout.entry(out, place).copy_(g)
        for one, value in zip(group, values, strict=True):
            one.node.meter(1, y.shape[1])
            one.node.log(loss=value)
        return [Vector(row, job.w.layout) for row, job in zip(out, jobs, strict=True)]

    def _descents(self, group: list[Parked]) -> list[tuple[Vector, int]]:
        """Steps of all clients whose next batches are of one size, again and again, until every client is through."""
        jobs: list[Any] = [one.job for one in group]
        first: Descent = jobs[0]
        flat = torch.stack([job.w.flat for job in jobs])
        chosen = self._chosen(first.only)
        moving, still = self._split(flat, chosen)
        slope = self._slope(first.loss, chosen)
        fixed = self._corrections(group, chosen) if isinstance(first.correct, Vector) else None
        velocity: list[Tensor] = []
        if first.momentum:
            velocity += [torch.zeros_like(tensor) for tensor in moving]
        datas = [one.node.data if job.data is None else job.data for one, job in zip(group, jobs, strict=True)]
        streams = [
            one.node.rows(job.batch, job.epochs, job.steps, data)
            for one, job, data in zip(group, jobs, datas, strict=True)
        ]
        following = {k: rows for k, stream in enumerate(streams) if (rows := next(stream, None)) is not None}
        steps, samples = [0] * len(group), [0] * len(group)
        losses = torch.zeros(len(group), device=flat.device)
        while following:
            size, members = _largest(following)
            x, y = _samples([datas[k] for k in members], [following[k] for k in members])
            rows = None if len(members) == len(group) else torch.tensor(members).to(flat.device, non_blocking=True)
            here, there, ball = (_rows(tensors, rows) for tensors in (moving, still, velocity))
            d, values = slope(here, there, x, y)
            if first.clip is not None:
                length = torch.stack([g.flatten(1).square().sum(1) for g in d]).sum(0).sqrt()
                scale = torch.clamp(first.clip / length, max=1.0)
                d = [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in d]
            terms = []
            if fixed is not None:
                terms.append(_rows(fixed, rows))
            elif callable(first.correct):
                terms.append(self._moving_terms([(group[k], flat[k]) for k in members], chosen))
            first.step(here, d, terms, ball)
            if rows is None:
                losses += values
            else:
                losses[rows] += values
                for whole, part in zip([*moving, *velocity], [*here, *ball], strict=True):
                    whole[rows] = part
            for k in members:
                steps[k], samples[k] = steps[k] + 1, samples[k] + size
                if (more := next(streams[k], None)) is None:
                    del following[k]
                else:
                    following[k] = more
        for k, one in enumerate(group):
            one.node.meter(steps[k], samples[k])
            if steps[k]:
                one.node.log(loss=losses[k] / steps[k])
        return [(Vector(row, job.w.layout), steps[k]) for k, (row, job) in enumerate(zip(flat, jobs, strict=True))]

    def _corrections(self, group: Sequence[Parked], chosen: Sequence[int]) -> list[Tensor]:
        parts = [self.site.bench.parts(one.job.correct, chosen) for one in group]  # type: ignore[union-attr, arg-type]
        return [torch.stack(entry) for entry in zip(*parts, strict=True)]

    def _moving_terms(self, at: Sequence[tuple[Parked, Tensor]], chosen: Sequence[int]) -> list[Tensor]:
        layout = self.site.bench.layout
        parts = [
            self.site.bench.parts(one.job.correct(Vector(row, layout, readonly=True)), chosen)  # type: ignore[union-attr, misc, operator]
            for one, row in at
        ]
        return [torch.stack(entry) for entry in zip(*parts, strict=True)]

    def _chosen(self, only: str | tuple[str, ...] | None) -> list[int]:
        return self.site.bench.choose(only)

    def _split(self, flat: Tensor, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Views [K, ...] of the parameters that move in `flat` [K, size], and of those that do not."""
        views = self.site.bench.layout.views(flat)
        inside = set(chosen)
        return [views[p] for p in chosen], [view for p, view in enumerate(views) if p not in inside]

    def _slope(self, loss: Loss, chosen: Sequence[int]) -> Callable[..., Any]:
        """Gradients and losses of K clients: of (moving [K, ..]s, still [K, ..]s, x [K, B, ..], y [K, B, ..])."""
        key = (_identity(loss), tuple(chosen))
        if key not in self.slopes:
            layout, inside = self.site.bench.layout, set(chosen)
            moving = [f"net.{layout.names[p]}" for p in chosen]
            still = [f"net.{name}" for p, name in enumerate(layout.names) if p not in inside]
            module = _Losing(self.site.bench.net, loss)

            def value(here: Sequence[Tensor], there: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
                weights = dict(zip([*moving, *still], [*here, *there], strict=True))
                out: Tensor = functional_call(module, weights, (x, y))
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

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.net, Batch(x, y))


def _kind(job: Descent | Slope) -> Any:
    """Jobs of one kind fit each other."""
    if isinstance(job, Slope):
        return (_identity(job.loss), job.only, job.batch.x.shape, job.batch.y.shape)
    correct = "vector" if isinstance(job.correct, Vector) else "function" if job.correct else None
    rule = (job.lr, job.momentum, job.weight_decay, job.clip, job.only)
    return (_identity(job.loss), rule, correct)


def _identity(loss: Callable[..., Any]) -> Any:
    """What tells losses apart: a bound method is made anew at every access, its object and function are not."""
    if isinstance(loss, Wrapped):
        return _identity(loss.wrap), _identity(loss.loss)
    return id(getattr(loss, "__self__", None)), getattr(loss, "__func__", loss)


def _samples(datas: Sequence[Data], rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs [K, B, ...] and targets [K, B, ...] of K clients; one gather if they share their storage."""
    first = datas[0]
    if all(data.inputs is first.inputs and data.labels is first.labels for data in datas):
        together = torch.stack(list(rows))
        return first.inputs[together], first.labels[together]
    pairs = [(data.inputs[mine], data.labels[mine]) for data, mine in zip(datas, rows, strict=True)]
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def _largest(following: Mapping[int, Tensor]) -> tuple[int, list[int]]:
    """The batch size for which most clients wait, and those clients."""
    sizes: dict[int, list[int]] = {}
    for k, rows in following.items():
        sizes.setdefault(rows.shape[0], []).append(k)
    return max(sizes.items(), key=lambda item: (len(item[1]), item[0]))


def _rows(tensors: Sequence[Tensor], rows: Tensor | None) -> list[Tensor]:
    return list(tensors) if rows is None else [tensor[rows] for tensor in tensors]
