"""Descents of many clients as one, with the clients as a batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedloom.bench import Bench
from fedloom.descent import Descent
from fedloom.node import Node
from fedloom.optimizers import Tensors
from fedloom.task import Batch, Data
from fedloom.vector import Vector

# of (moving [K, ..]s, still [K, ..]s, x [K, B, ..], y [K, B, ..], columns [K, B, ..]s): gradients, losses [K]
Slopes = Callable[..., Any]
Samples = tuple[Tensor, Tensor, tuple[Tensor, ...]]


class Descents:
    """Descents that fit each other: steps of all clients whose next batches are of one size, until all are through."""

    def __init__(self, nodes: Sequence[Node], jobs: Sequence[Descent], bench: Bench, slope: Slopes) -> None:
        self.nodes, self.jobs, self.bench, self.slope = nodes, jobs, bench, slope
        self.first = jobs[0]
        self.flat = torch.stack([job.w.flat for job in jobs])
        self.chosen = bench.choose(self.first.only)
        self.moving, self.still = split(bench, self.flat, self.chosen)
        self.memory = self.first.optimizer.start(self.moving)
        self.fixed: list[Tensor] | None = None
        if isinstance(self.first.correct, Vector):
            self.fixed = self._stacked([job.correct for job in jobs])
        self.datas = [node.data if job.data is None else job.data for node, job in zip(nodes, jobs, strict=True)]
        asked = [(job.batch, job.epochs, job.steps, data) for job, data in zip(jobs, self.datas, strict=True)]
        self.totals = [node.count(*its) for node, its in zip(nodes, asked, strict=True)]
        self.streams = [node.rows(*its) for node, its in zip(nodes, asked, strict=True)]
        self.steps, self.samples, self.more = ([0] * len(nodes) for _ in range(3))
        self.losses = torch.zeros(len(nodes), device=self.flat.device)

    def run(self) -> list[tuple[Vector, int]]:
        """Where each client ends, and its number of steps."""
        following = {k: rows for k, stream in enumerate(self.streams) if (rows := next(stream, None)) is not None}
        while following:
            members = self._turn(following)
            for k in members:
                if (more := next(self.streams[k], None)) is None:
                    del following[k]
                else:
                    following[k] = more
        for k, node in enumerate(self.nodes):
            node.meter(self.steps[k] + self.more[k], self.samples[k])
            if self.steps[k]:
                node.log(loss=self.losses[k] / self.steps[k])
        return [(Vector(row, job.w.layout), n) for row, job, n in zip(self.flat, self.jobs, self.steps, strict=True)]

    def _turn(self, following: Mapping[int, Tensor]) -> list[int]:
        """One step of the clients whose next batches have the size that most have."""
        rule, (size, members) = self.first.optimizer, _largest(following)
        batch = samples([self.datas[k] for k in members], [following[k] for k in members])
        everybody = len(members) == len(self.nodes)
        rows = None if everybody else torch.tensor(members).to(self.flat.device, non_blocking=True)
        here, there, kept = (_rows(tensors, rows) for tensors in (self.moving, self.still, self.memory))
        gradient, values = self.slope(here, there, *batch)
        points = [self.flat[k] for k in members] if callable(self.first.correct) else []
        d = self._direction(here, gradient, members, rows, points)
        again = None
        if rule.looks_back and any(self.steps[k] for k in members):
            again = partial(self._direction_at, members, rows, there, batch)
        rule.step(here, d, self._rates(members), kept, again)
        if rows is None:
            self.losses += values
        else:
            self.losses[rows] += values
            for whole, part in zip([*self.moving, *self.memory], [*here, *kept], strict=True):
                whole[rows] = part
        for k in members:
            looks = 1 if again and self.steps[k] else 0
            self.steps[k], self.more[k] = self.steps[k] + 1, self.more[k] + looks
            self.samples[k] += size * (1 + looks)
        return members

    def _direction(
        self, at: Tensors, gradient: Tensors, members: Sequence[int], rows: Tensor | None, points: Sequence[Tensor]
    ) -> Tensors:
        """The directions of some clients at the parameters `at`; `points` are their whole vectors there."""
        if self.first.clip is not None:
            length = torch.stack([g.flatten(1).square().sum(1) for g in gradient]).sum(0).sqrt()
            scale = torch.clamp(self.first.clip / length, max=1.0)
            gradient = [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in gradient]
        terms: list[Tensors] = []
        if self.fixed is not None:
            terms.append(_rows(self.fixed, rows))
        elif callable(self.first.correct):
            layout, its = self.bench.layout, [self.jobs[k].correct for k in members]
            at_points = [Vector(point, layout, readonly=True) for point in points]
            terms.append(self._stacked([one(w) for one, w in zip(its, at_points, strict=True)]))  # type: ignore[misc, operator]
        return self.first.direction(at, gradient, terms)

    def _direction_at(
        self,
        members: Sequence[int],
        rows: Tensor | None,
        there: Tensors,
        batch: Samples,
        at: Sequence[Tensor],
    ) -> Tensors:
        """The directions of the same batches at other points."""
        gradient, _ = self.slope(at, there, *batch)
        points: list[Tensor] = []
        if callable(self.first.correct):
            whole = self.flat[list(members)]
            for view, tensor in zip(split(self.bench, whole, self.chosen)[0], at, strict=True):
                view.copy_(tensor)
            points = list(whole)
        return self._direction(list(at), gradient, members, rows, points)

    def _rates(self, members: Sequence[int]) -> float | Tensor:
        """The rates of some clients in their next steps."""
        rates = [self.first.rate(self.steps[k], self.totals[k]) for k in members]
        return rates[0] if len({*rates}) == 1 else torch.tensor(rates, dtype=self.flat.dtype).to(self.flat.device)

    def _stacked(self, corrections: Sequence[Any]) -> list[Tensor]:
        """The corrections of clients for the parameters that move, [K, ...] each."""
        parts = [self.bench.parts(one, self.chosen) for one in corrections]
        return [torch.stack(entry) for entry in zip(*parts, strict=True)]


def split(bench: Bench, flat: Tensor, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Views [K, ...] of the parameters that move in `flat` [K, size], and of those that do not."""
    views = bench.layout.views(flat)
    inside = set(chosen)
    return [views[p] for p in chosen], [view for p, view in enumerate(views) if p not in inside]


def samples(datas: Sequence[Data], rows: Sequence[Tensor]) -> Samples:
    """Inputs and targets [K, B, ...], and columns beside them, of K clients; one gather if they share their storage."""
    first = datas[0]
    if all(data.inputs is first.inputs and data.labels is first.labels for data in datas):
        return parts(first.at(torch.stack(list(rows))))
    return stacked([data.at(mine) for data, mine in zip(datas, rows, strict=True)])


def parts(batch: Batch) -> Samples:
    """The tensors of a batch; the columns beside x and y are in the order of their names."""
    return batch.x, batch.y, tuple(batch.metadata[name] for name in sorted(batch.metadata))


def stacked(batches: Sequence[Batch]) -> Samples:
    """The tensors of batches of one size, with the clients as a dimension before the first."""
    x, y, columns = zip(*map(parts, batches), strict=True)
    return torch.stack(x), torch.stack(y), tuple(map(torch.stack, zip(*columns, strict=True)))


def _largest(following: Mapping[int, Tensor]) -> tuple[int, list[int]]:
    """The batch size for which most clients wait, and those clients."""
    sizes: dict[int, list[int]] = {}
    for k, rows in following.items():
        sizes.setdefault(rows.shape[0], []).append(k)
    return max(sizes.items(), key=lambda item: (len(item[1]), item[0]))


def _rows(tensors: Sequence[Tensor], rows: Tensor | None) -> list[Tensor]:
    return list(tensors) if rows is None else [tensor[rows] for tensor in tensors]
