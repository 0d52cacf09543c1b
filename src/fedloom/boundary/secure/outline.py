"""The outline of a reply: names, shapes and types of what is summed, which are public, without the numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.boundary.secure.field import Doubles
from fedloom.errors import RunError
from fedloom.mean import Form, Path, Sum
from fedloom.message import Value
from fedloom.vector import Layout, Vector

MOST = 1 << 28  # numbers of an outline that a stranger sends, so that nobody is made to fill his memory with zeros
KINDS: dict[str, type] = {"dict": dict, "list": list, "tuple": tuple}


@dataclass(frozen=True)
class Outline:
    """The leaves of a reply in one order for all clients, and the containers around them.

    Every leaf has a weight of its own (a `Sparse` one a row), so that replies may be partial: nobody but the sum tells
    who sent which coordinate. Which fields and keys a client's reply has, its outline does tell.
    """

    leaves: Mapping[Path, tuple[Form, torch.dtype]] = field(default_factory=dict)
    containers: Mapping[Path, type] = field(default_factory=dict)

    @staticmethod
    def of(reply: Sum) -> Outline:
        """The outline of one reply."""
        leaves = {path: (leaf.form, leaf.dtype) for path, leaf in reply.leaves.items()}
        return Outline(dict(sorted(leaves.items(), key=_order)), dict(sorted(reply.containers.items(), key=_order)))

    def joined(self, other: Outline) -> Outline:
        """The outline of everything that either has; raises RunError where one path has two forms."""
        for path in other.leaves.keys() | other.containers.keys():
            mine, its = self._at(path), other._at(path)
            if mine not in (None, its):
                raise RunError(f"secure mean of the field {_named(path)}: replies differ, {mine} and {its}")
        leaves, containers = {**other.leaves, **self.leaves}, {**other.containers, **self.containers}
        return Outline(dict(sorted(leaves.items(), key=_order)), dict(sorted(containers.items(), key=_order)))

    @staticmethod
    def agreed(outlines: Iterable[Outline], quorum: int) -> Outline:
        """What is summed: the leaves that so many of these replies have that no value comes out as one client's own.

        A quorum must have a leaf, and at least two of them even if as many clients as the quorum allows for are lost.
        """
        outlines = list(outlines)
        whole = Outline()
        for outline in outlines:
            whole = whole.joined(outline)
        counts = Counter(path for outline in outlines for path in outline.leaves)
        enough = max(quorum, len(outlines) - quorum + 2)
        return Outline({path: leaf for path, leaf in whole.leaves.items() if counts[path] >= enough}, whole.containers)

    def _at(self, path: Path) -> str | None:
        if path in self.containers:
            return self.containers[path].__name__
        return str(self.leaves[path][0]) if path in self.leaves else None

    @property
    def weights(self) -> int:
        """How many weights are summed: that of the reply, and those of the leaves."""
        return 1 + sum(_rows(form) for form, _ in self.leaves.values())

    @property
    def numbers(self) -> int:
        """How many numbers are summed."""
        return sum(math.prod(form.shape) for form, _ in self.leaves.values())

    def flat(self, reply: Sum) -> tuple[Doubles, Doubles]:
        """The weights [W] and the numbers times their weights [N] of a reply; zeros for what it lacks.

        What was not agreed on stays with the client.
        """
        self.joined(Outline.of(reply))  # raises where a field has another form here
        weights, numbers = np.zeros(self.weights), np.zeros(self.numbers)
        weights[0] = reply.weight
        for path, _, weight_at, number_at in self._spans():
            if path in reply.leaves:
                leaf = reply.leaves[path]
                weights[weight_at] = _array(leaf.weight)
                numbers[number_at] = _array(leaf.total)
        return weights, numbers

    def field_of(self, number: int) -> str:
        """The name of the field that a place in the numbers belongs to."""
        return next(_named(path) for path, _, _, number_at in self._spans() if number < number_at.stop)

    def filled(self, weights: Doubles, numbers: Doubles, count: int, device: torch.device) -> Sum:
        """The sum of `count` replies whose weights and numbers sum to these. What nobody sent is not in it."""
        leaves: list[dict[str, Any]] = []
        for path, (form, dtype), weight_at, number_at in self._spans():
            weight, total = torch.from_numpy(weights[weight_at].copy()), torch.from_numpy(numbers[number_at].copy())
            dense = form.kind != "sparse"
            if dense and not weight.item() and weights[0]:
                continue
            shaped: Any = total.view(form.shape)
            shaped = Vector(total, form.layout) if form.layout else total.item() if form.kind == "number" else shaped
            leaves.append(
                {
                    "path": path,
                    "total": shaped,
                    "weight": weight.item() if dense else weight,
                    "form": [form.kind, form.shape],
                    "like": torch.empty(0, dtype=dtype),
                }
            )
        containers = [[path, kind.__name__] for path, kind in self.containers.items()]
        packed = {"leaves": leaves, "containers": containers, "weight": float(weights[0]), "count": count}
        return Sum.unpacked(packed, device)

    def _spans(self) -> Iterator[tuple[Path, tuple[Form, torch.dtype], slice, slice]]:
        weight, number = 1, 0
        for path, (form, dtype) in self.leaves.items():
            rows, size = _rows(form), math.prod(form.shape)
            yield path, (form, dtype), slice(weight, weight + rows), slice(number, number + size)
            weight, number = weight + rows, number + size

    def packed(self) -> dict[str, Value]:
        """This outline as a value of a message."""
        leaves: list[Value] = []
        for path, (form, dtype) in self.leaves.items():
            layout = form.layout
            parts: list[Value] = []
            if layout:
                parts = [list(layout.names), [list(shape) for shape in layout.shapes], layout.parameters]
            leaves.append([list(path), form.kind, list(form.shape), parts, torch.empty(0, dtype=dtype)])
        containers: list[Value] = [[list(path), kind.__name__] for path, kind in self.containers.items()]
        return {"leaves": leaves, "containers": containers}

    @staticmethod
    def unpacked(packed: Any) -> Outline:
        """The outline that `packed` made a value of; raises RunError for what is none."""
        try:
            leaves: dict[Path, tuple[Form, torch.dtype]] = {}
            for path, kind, shape, parts, like in packed["leaves"]:
                layout = None
                if parts:
                    layout = Layout(tuple(parts[0]), tuple(tuple(shape) for shape in parts[1]), parts[2])
                leaves[tuple(path)] = (Form(kind, tuple(shape), layout), like.dtype)
            containers = {tuple(path): KINDS[kind] for path, kind in packed["containers"]}
            forms = [form for form, _ in leaves.values()]
            extents = [extent for form in forms for extent in form.shape]
            if not all(type(extent) is int and extent >= 0 for extent in extents):
                raise ValueError(f"extents {extents[:9]}")
            if any(form.layout and (form.layout.size,) != form.shape for form in forms) or not {
                form.kind for form in forms
            } <= {"vector", "sparse", "tensor", "number"}:
                raise ValueError(f"forms {forms[:9]}")
            made = Outline(leaves, containers)
            if made.weights + made.numbers > MOST:
                raise ValueError(f"{made.weights + made.numbers} numbers")
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise RunError(f"secure aggregation got an outline of a reply that is none: {error!r}") from error
        return made


def _order(entry: tuple[Path, Any]) -> list[tuple[str, str | int]]:
    return [(type(key).__name__, key) for key in entry[0]]


def _rows(form: Form) -> int:
    return form.shape[0] if form.kind == "sparse" else 1


def _array(value: Tensor | float) -> Any:
    return value.detach().cpu().numpy().reshape(-1) if isinstance(value, Tensor) else value


def _named(path: Path) -> str:
    return repr(".".join(map(str, path)))
