"""The mean of replies: streaming, per coordinate, along a tree whose shape depends on the cohort alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom.errors import RunError
from fedloom.message import Sparse, Value
from fedloom.vector import Layout, Vector

Path = tuple[str | int, ...]
PIECE = 1 << 20  # numbers of a large tensor that are made doubles at once, where they need not all be


class Form(NamedTuple):
    """What a field is, apart from its numbers: replies whose forms differ have no mean."""

    kind: str  # vector, sparse, tensor or number
    shape: tuple[int, ...] = ()
    layout: Layout | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.layout}" if self.layout else f"{self.kind} {list(self.shape)}"


class Portion(NamedTuple):
    """One tensor in a `row` of numbers: where it stands in a reply, and its name in a vector (else nothing)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    learned: bool = True  # it is no running statistic
    layout: Layout | None = None  # of the whole vector


@dataclass
class _Leaf:
    """A weighted sum of values in double precision, the weight behind it (per coordinate if sparse), and its form.

    With a `scale` its `value` is a tensor of a reply still, to be multiplied by it.
    """

    value: Tensor | float
    weight: Tensor | float
    form: Form
    dtype: torch.dtype  # of the mean
    scale: float | None = None

    @property
    def total(self) -> Tensor | float:
        """The sum, in memory of its own."""
        self.own()
        return self.value

    def own(self) -> None:
        if self.scale is not None:
            assert isinstance(self.value, Tensor)
            self.value, self.scale = _times(self.value, self.scale), None

    def take(self, theirs: _Leaf) -> None:
        """Adds another sum; doubles are made of a reply's tensor piece by piece."""
        mine = self.total
        if theirs.scale is None or not (isinstance(mine, Tensor) and mine.is_contiguous()):
            mine += theirs.total
        else:
            assert isinstance(theirs.value, Tensor)
            pieces = zip(mine.view(-1).split(PIECE), theirs.value.view(-1).split(PIECE), strict=True)
            for here, its in pieces:
                here += _times(its, theirs.scale)
        self.value = mine
        self.weight += theirs.weight


class Sum:
    """A weighted sum of replies, field by field; the sum of two sums is a sum."""

    def __init__(self, weight: float, count: int) -> None:
        self.leaves: dict[Path, _Leaf] = {}
        self.containers: dict[Path, type] = {}
        self.weight = weight
        self.count = count

    @staticmethod
    def of(reply: Mapping[str, Any], weight: float, lent: bool = False) -> Sum:
        """One reply times its weight. Doubles make the mean of a single reply that reply, bitwise.

        `lent`: its large tensors are the reply's, which nobody changes, until it is `owned` or taken into another sum.
        """
        one = Sum(weight, 1)
        for name, value in reply.items():
            one._enter((name,), value)
        return one if lent else one.owned()

    def owned(self) -> Sum:
        """This sum, all of it in memory of its own."""
        for leaf in self.leaves.values():
            leaf.own()
        return self

    def _enter(self, path: Path, value: Any) -> None:
        weight: Tensor | float = self.weight
        scale: float | None = None
        if isinstance(value, Mapping | list | tuple):
            self.containers[path] = dict if isinstance(value, Mapping) else type(value)
            for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
                self._enter((*path, key), inner)
            return
        if isinstance(value, Sparse):
            shape = (value.size, *value.values.shape[1:])
            total: Tensor | float = torch.zeros(shape, dtype=torch.float64, device=value.values.device)
            weight = torch.zeros(value.size, dtype=torch.float64, device=value.values.device)
            total[value.index] = value.values.double() * self.weight  # type: ignore[index]
            weight[value.index] = self.weight
            form, dtype = Form("sparse", shape), value.values.dtype
        elif isinstance(value, Vector):
            total, scale = self._weighed(value.flat)
            form, dtype = Form("vector", (len(value),), value.layout), value.flat.dtype
        elif isinstance(value, Tensor) and not value.is_complex():
            total, scale = self._weighed(value)
            form = Form("tensor", tuple(value.shape))
            dtype = value.dtype if value.is_floating_point() else torch.float32
        elif isinstance(value, int | float):
            total, form, dtype = value * self.weight, Form("number"), torch.float64
        else:
            kind = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise RunError(f"mean cannot average the field {_named(path)}, a {kind}; use call, or do not send it")
        self.leaves[path] = _Leaf(total, weight, form, dtype, scale)

    def _weighed(self, value: Tensor) -> tuple[Tensor, float | None]:
        """A tensor times the weight, or itself with the weight where it is large."""
        if value.numel() > PIECE and value.is_contiguous():
            return value, self.weight
        return _times(value, self.weight), None

    def add(self, other: Sum) -> Sum:
        """Takes in another sum (and gives up its memory); what only one of them has is kept as it is."""
        for path in (*other.containers, *other.leaves):
            mine, its = self._form(path), other._form(path)
            if mine not in (None, its):
                one, another = (form.__name__ if isinstance(form, type) else form for form in (mine, its))
                raise RunError(f"mean of the field {_named(path)}: replies differ, {one} and {another}")
        for path, theirs in other.leaves.items():
            if path in self.leaves:
                self.leaves[path].take(theirs)
            else:
                self.leaves[path] = theirs
        self.containers |= other.containers
        self.weight += other.weight
        self.count += other.count
        return self

    def _form(self, path: Path) -> type | Form | None:
        return self.containers.get(path) or (self.leaves[path].form if path in self.leaves else None)

    def mean(self) -> dict[str, Any]:
        """The weighted mean of every field, in the form in which clients sent it (numbers as float)."""
        root: dict[Any, Any] = {}
        means: dict[Path, Any] = {path: {} for path in self.containers}  # empty ones included
        for path, value in (means | self._divided()).items():
            inner = root
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
        return {name: self._rebuilt((name,), value) for name, value in root.items()}

    def _divided(self) -> dict[Path, Any]:
        # What only clients of weight zero sent has no mean.
        sent = {path: leaf for path, leaf in self.leaves.items() if isinstance(leaf.weight, Tensor) or leaf.weight}
        return {path: _divided(leaf) for path, leaf in sent.items()}

    def _rebuilt(self, path: Path, value: Any) -> Any:
        if path not in self.containers:
            return value
        inner = {key: self._rebuilt((*path, key), item) for key, item in value.items()}
        kind = self.containers[path]
        return inner if kind is dict else kind(inner[place] for place in sorted(inner))

    def row(self, like: Sum) -> Tensor:
        """All its numbers in one row, float32 [D], in the order of `like`; raises RunError unless the forms agree."""
        for path in {*self.containers, *self.leaves, *like.containers, *like.leaves}:
            mine, its = self._form(path), like._form(path)
            if mine != its or (isinstance(mine, Form) and mine.kind == "sparse"):
                raise RunError(f"a robust rule needs replies that are whole and alike; in {_named(path)} they are not")
        return torch.cat([torch.as_tensor(self.leaves[path].total).flatten().float() for path in like.leaves])

    def learned(self, device: torch.device) -> Tensor:
        """Which numbers of a `row` are learned, bool [D]: all but the running statistics of vectors."""
        masks = [torch.full((math.prod(one.shape),), one.learned, device=device) for one in self.portions()]
        return torch.cat(masks)

    def portions(self) -> Iterator[Portion]:
        """What a `row` is made of, in its order."""
        for path, leaf in self.leaves.items():
            if layout := leaf.form.layout:
                for place, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
                    yield Portion(path, name, shape, place < layout.parameters, layout)
            else:
                yield Portion(path, "", leaf.form.shape)

    def filled(self, row: Tensor, weight: float, count: int) -> Sum:
        """A sum of this form whose mean is `row` [D]; as if it came of so many replies of that weight together."""
        total, start = Sum(weight, count), 0
        total.containers = dict(self.containers)
        for path, leaf in self.leaves.items():
            size = leaf.total.numel() if isinstance(leaf.total, Tensor) else 1
            piece = row[start : start + size]
            start += size
            value = piece.view(leaf.total.shape) if isinstance(leaf.total, Tensor) else piece.item()
            total.leaves[path] = _Leaf(value, 1.0, leaf.form, leaf.dtype)
        return total

    def packed(self) -> dict[str, Value]:
        """This sum as a message, from a worker that reduced a part of the cohort."""
        leaves: list[Value] = [
            {
                "path": list(path),
                "total": Vector(leaf.total, leaf.form.layout)
                if isinstance(leaf.total, Tensor) and leaf.form.layout
                else leaf.total,
                "weight": leaf.weight,
                "form": [leaf.form.kind, list(leaf.form.shape)],
                "like": torch.empty(0, dtype=leaf.dtype),
            }
            for path, leaf in self.leaves.items()
        ]
        containers: list[Value] = [[list(path), kind.__name__] for path, kind in self.containers.items()]
        return {"leaves": leaves, "containers": containers, "weight": self.weight, "count": self.count}

    @staticmethod
    def unpacked(packed: Mapping[str, Any], device: torch.device) -> Sum:
        """The sum that `packed` made a message of."""
        total = Sum(packed["weight"], packed["count"])
        for leaf in packed["leaves"]:
            value, (kind, shape), weight = leaf["total"], leaf["form"], leaf["weight"]
            form = Form(kind, tuple(shape), value.layout if isinstance(value, Vector) else None)
            flat = value.flat if isinstance(value, Vector) else value
            total.leaves[tuple(leaf["path"])] = _Leaf(
                flat.to(device) if isinstance(flat, Tensor) else flat,
                weight.to(device) if isinstance(weight, Tensor) else weight,
                form,
                leaf["like"].dtype,
            )
        kinds = {"dict": dict, "list": list, "tuple": tuple}
        total.containers = {tuple(path): kinds[kind] for path, kind in packed["containers"]}
        return total


def split_weight(
    where: str, client: int, reply: Mapping[str, Any], weight: str | None
) -> tuple[Mapping[str, Any], float]:
    """What is averaged of a reply, and its weight: the number in its field `weight`, itself not averaged, or 1.

    `where` says in errors what is averaged.
    """
    if weight is None:
        return reply, 1.0
    where = f"{where}, weight={weight!r}"
    if weight not in reply:
        raise RunError(f"{where}: the reply of client {client} has no such field")
    number = reply[weight]
    if not isinstance(number, int | float) or number < 0:
        raise RunError(f"{where}: client {client} sent {number!r}; a weight is a number, at least 0")
    return {field: value for field, value in reply.items() if field != weight}, float(number)


def _named(path: Path) -> str:
    return repr(".".join(map(str, path)))


def _times(value: Tensor, weight: float) -> Tensor:
    """A tensor of a reply, which stays as it is, times a weight, in doubles."""
    return value.to(torch.float64, copy=True).mul_(weight)


def _divided(leaf: _Leaf) -> Any:
    if leaf.form.kind == "number":
        return leaf.total / leaf.weight
    if leaf.form.kind == "sparse":
        assert isinstance(leaf.total, Tensor)
        assert isinstance(leaf.weight, Tensor)
        index = leaf.weight.nonzero().squeeze(1)
        weight = leaf.weight[index].view(-1, *[1] * (leaf.total.dim() - 1))
        return Sparse(index, (leaf.total[index] / weight).to(leaf.dtype), leaf.form.shape[0])
    assert isinstance(leaf.total, Tensor)
    flat = torch.empty_like(leaf.total, dtype=leaf.dtype)
    if flat.is_contiguous() and leaf.total.is_contiguous():
        for here, its in zip(flat.view(-1).split(PIECE), leaf.total.view(-1).split(PIECE), strict=True):
            here.copy_(its / leaf.weight)
    else:
        flat.copy_(leaf.total / leaf.weight)
    return Vector(flat, leaf.form.layout) if leaf.form.layout else flat


class Tree:
    """Adds sums in pairs: leaf 0 with 1, 2 with 3, then pairs of pairs. A lost reply is an empty leaf, None.

    The shape depends on nothing but places, and a node is joined as soon as its sibling is there: sums may arrive in
    any order, and workers that each reduce an aligned block of 2**k places give bitwise the result of one. In order,
    memory grows with the logarithm of the leaves.
    """

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], Sum | None] = {}
        self.pushed = 0

    def push(self, leaf: Sum | None) -> None:
        """The sum at the next place."""
        self.put(0, self.pushed, leaf)
        self.pushed += 1

    def put(self, level: int, index: int, node: Sum | None) -> None:
        """The sum of the places from `index * 2**level` to `(index + 1) * 2**level`; every place is given once."""
        while (level, index ^ 1) in self.nodes:
            sibling = self.nodes.pop((level, index ^ 1))
            node = _joined(node, sibling) if index % 2 == 0 else _joined(sibling, node)
            level, index = level + 1, index // 2
        self.nodes[level, index] = None if node is None else node.owned()

    def total(self) -> Sum | None:
        """The sum of everything given; None if that is nothing. The tree is empty afterwards."""
        while len(self.nodes) > 1:
            level, index = min(self.nodes)  # its sibling is empty: places that are never given, or lie past the last
            self.put(level + 1, index // 2, self.nodes.pop((level, index)))
        return self.nodes.popitem()[1] if self.nodes else None


class Placed:
    """The sum of replies along the tree over the places of those asked; whoever gives none leaves its place empty."""

    def __init__(self, asked: Iterable[int]) -> None:
        self.tree = Tree()
        self.places = {client: place for place, client in enumerate(asked)}

    def add(self, client: int, reply: Sum) -> None:
        """A client's reply; they come in the order of those asked."""
        while self.tree.pushed < self.places[client]:
            self.tree.push(None)
        self.tree.push(reply)

    def total(self) -> Sum | None:
        """The sum of all; None if there is none."""
        return self.tree.total()


def _joined(left: Sum | None, right: Sum | None) -> Sum | None:
    if left is None or right is None:
        return left if right is None else right
    return left.add(right)
