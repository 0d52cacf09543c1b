"""A model as a point: one flat float tensor and the layout that names its parts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError, unknown

Scalar = int | float | Tensor


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a flat vector: a parameter segment first, then a segment of float buffers.

    Entries lie one after another, each in the order of its axes; those with four axes channels last: [0, 2, 3, 1].
    Integer buffers (BatchNorm's step counter) have no place here: they never move.

    Examples:
        >>> layout = fedloom.Layout.of(torch.nn.Linear(3, 2))
        >>> layout.names, layout.shapes, layout.size
        (('weight', 'bias'), ((2, 3), (2,)), 8)
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    parameters: int  # how many of the names are parameters; the rest are float buffers

    @staticmethod
    def of(net: nn.Module) -> Layout:
        """The layout of a network's floating-point buffers and of its parameters that require gradients.

        The other parameters are frozen: they are part of the problem, not of the model that is learned.
        """
        parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        buffers = {name: value for name, value in net.named_buffers() if value.is_floating_point()}
        both = parameters | buffers
        return Layout(tuple(both), tuple(tuple(v.shape) for v in both.values()), len(parameters))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each entry starts, and as a last number where the vector ends."""
        return (0, *accumulate(self.sizes))

    @cached_property
    def size(self) -> int:
        """Length of the flat tensor."""
        return self.offsets[-1]

    @cached_property
    def split(self) -> int:
        """Where the parameter segment ends and the buffer segment begins in the flat tensor."""
        return self.offsets[self.parameters]

    @cached_property
    def places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def digest(self) -> str:
        """A name for this layout: equal layouts, and only they, have equal digests."""
        return hashlib.blake2b(repr((self.names, self.shapes, self.parameters)).encode(), digest_size=8).hexdigest()

    def held(self, net: nn.Module) -> list[Tensor]:
        """The parameters and buffers of a network by the names of this layout."""
        owned = dict(net.named_parameters()) | dict(net.named_buffers())
        return [owned[name] for name in self.names]

    def entry(self, flat: Tensor, place: int) -> Tensor:
        """One entry of a flat tensor [..., size] in its own shape [..., *shape], sharing its memory."""
        part, shape = flat[..., self.offsets[place] : self.offsets[place + 1]], self.shapes[place]
        if len(shape) != 4:
            return part.view((*part.shape[:-1], *shape))
        out, into, high, wide = shape
        return part.view(*part.shape[:-1], out, high, wide, into).movedim(-1, -3)

    def views(self, flat: Tensor) -> list[Tensor]:
        """All entries of a flat tensor [..., size], in their shapes, sharing its memory."""
        return [self.entry(flat, place) for place in range(len(self.names))]

    def flatten(self, entries: Sequence[Tensor]) -> Tensor:
        """The flat tensor [..., n] of some entries [..., *shape] in the order in which this layout stores them."""
        return torch.cat(
            [self.stored(entry, len(shape)) for entry, shape in zip(entries, self.shapes, strict=True)], -1
        )

    @staticmethod
    def stored(entry: Tensor, dims: int) -> Tensor:
        """An entry [..., *shape] with `dims` axes as it lies in a flat tensor, [..., n]."""
        # Convolutions are a third faster on processors when their weights lie channels last.
        return (entry.movedim(-3, -1) if dims == 4 else entry).reshape((*entry.shape[: entry.dim() - dims], -1))

    def part(self, places: Sequence[int]) -> Layout:
        """The layout of some of the entries, in their order here."""
        return Layout(
            tuple(self.names[p] for p in places),
            tuple(self.shapes[p] for p in places),
            sum(p < self.parameters for p in places),
        )

    def matching(self, patterns: Sequence[str]) -> list[int]:
        """Places of the names that match any of the shell patterns; a pattern that matches none is an error."""
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.names):
                raise unknown("part of a model", pattern, self.names)
        return [p for p, name in enumerate(self.names) if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def __str__(self) -> str:
        shown = ", ".join(f"{n}{list(s)}" for n, s in zip(self.names[:4], self.shapes, strict=False))
        more = f", ... {len(self.names) - 4} more" if len(self.names) > 4 else ""
        return f"{{{shown}{more}; {self.size} numbers}}"


class Vector:
    """A point in the space of a layout. Arithmetic gives new vectors; different layouts do not mix.

    `flat` is a floating-point tensor [size]. `readonly` marks what came in a message: `Node.grad` leaves the
    running statistics of such a vector alone.

    Examples:
        >>> w = fedloom.Vector.of(torch.nn.Linear(3, 2))
        >>> step = 0.5 * (w - 2 * w)
        >>> bool((w + step).norm() < w.norm())
        True
        >>> list(w), w["bias"].shape, w.select("bias").layout.size
        (['weight', 'bias'], torch.Size([2]), 2)
    """

    __slots__ = ("flat", "layout", "readonly")

    def __init__(self, flat: Tensor, layout: Layout, readonly: bool = False) -> None:
        if flat.dim() != 1 or flat.numel() != layout.size or not flat.is_floating_point():
            raise UsageError(
                f"a vector of layout {layout} needs a float tensor [{layout.size}], got {flat.dtype} {list(flat.shape)}"
            )
        self.flat = flat
        self.layout = layout
        self.readonly = readonly

    @staticmethod
    def of(net: nn.Module, layout: Layout | None = None) -> Vector:
        """A copy of what a layout names in a network; default: its trained parameters and its float buffers."""
        layout = layout or Layout.of(net)
        return Vector(layout.flatten([value.detach() for value in layout.held(net)]), layout)

    def _new(self, flat: Tensor) -> Vector:
        return Vector(flat, self.layout)

    def _with(self, other: Vector | Scalar, operation: Callable[[Tensor, Tensor | float], Tensor]) -> Vector:
        if isinstance(other, Vector):
            if other.layout is not self.layout and other.layout != self.layout:
                raise UsageError(f"vectors of different layouts: {self.layout} and {other.layout}")
            return Vector(operation(self.flat, other.flat), self.layout)
        if isinstance(other, (int, float)) or (isinstance(other, Tensor) and other.dim() == 0):
            return Vector(operation(self.flat, other), self.layout)
        return NotImplemented

    def __add__(self, other: Vector | Scalar) -> Vector:
        return self._with(other, torch.add)

    def __radd__(self, other: Scalar) -> Vector:
        return self._with(other, torch.add)

    def __sub__(self, other: Vector | Scalar) -> Vector:
        return self._with(other, torch.sub)

    def __rsub__(self, other: Scalar) -> Vector:
        return self._with(other, lambda mine, its: its - mine)

    def __mul__(self, other: Vector | Scalar) -> Vector:
        """Product with a number, or coordinate by coordinate with a vector."""
        return self._with(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: Vector | Scalar) -> Vector:
        return self._with(other, torch.div)

    def __pow__(self, power: float) -> Vector:
        return self._new(self.flat**power)

    def __neg__(self) -> Vector:
        return self._new(-self.flat)

    def __matmul__(self, other: Vector) -> Tensor:
        """The inner product, a tensor []."""
        if other.layout != self.layout:
            raise UsageError(f"vectors of different layouts: {self.layout} and {other.layout}")
        return self.flat @ other.flat

    def norm(self) -> Tensor:
        """The Euclidean length, a tensor []."""
        return torch.linalg.vector_norm(self.flat)

    def map(self, function: Callable[[Tensor], Tensor]) -> Vector:
        """A function of one flat tensor, coordinate by coordinate: `v.map(torch.sign)`."""
        return self._new(function(self.flat))

    def sqrt(self) -> Vector:
        return self.map(torch.sqrt)

    def sign(self) -> Vector:
        return self.map(torch.sign)

    def abs(self) -> Vector:
        return self.map(torch.abs)

    def clone(self) -> Vector:
        return self._new(self.flat.clone())

    def zeros_like(self) -> Vector:
        return self._new(torch.zeros_like(self.flat))

    def to(self, device: str | torch.device) -> Vector:
        return self._new(self.flat.to(device))

    def __getitem__(self, name: str) -> Tensor:
        """The entry of that name in its own shape, sharing memory."""
        if name not in self.layout.places:
            raise unknown("part of a model", name, self.layout.names)
        return self.layout.entry(self.flat, self.layout.places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return self.layout.size

    @property
    def params(self) -> Vector:
        """The parameter segment, where gradients live; sharing memory."""
        if self.layout.parameters == len(self.layout.names):
            return self
        return Vector(self.flat[: self.layout.split], self.layout.part(range(self.layout.parameters)))

    @property
    def buffers(self) -> Vector:
        """The segment of float buffers (running statistics); sharing memory."""
        places = range(self.layout.parameters, len(self.layout.names))
        return Vector(self.flat[self.layout.split :], self.layout.part(places))

    def select(self, *patterns: str) -> Vector:
        """The entries whose names match any of the shell patterns (`body.*`), as a vector of their own."""
        return self._part(self.layout.matching(patterns))

    def drop(self, *patterns: str) -> Vector:
        """The entries whose names match none of the shell patterns, as a vector of their own."""
        out = set(self.layout.matching(patterns))
        return self._part([p for p in range(len(self.layout.names)) if p not in out])

    def _part(self, places: Sequence[int]) -> Vector:
        offsets = self.layout.offsets
        pieces = [self.flat[offsets[p] : offsets[p + 1]] for p in places]
        return Vector(torch.cat(pieces) if pieces else self.flat[:0], self.layout.part(places))

    def merge(self, part: Vector) -> Vector:
        """This vector with the entries that `part` has replaced by its own; what it lacks stays bitwise."""
        if part.layout == self.layout:
            return part.clone()
        merged = self.clone()
        for name in part:
            if merged[name].shape != part[name].shape:
                raise UsageError(
                    f"{name!r} has shape {list(merged[name].shape)}, the part to merge has {list(part[name].shape)}"
                )
            merged[name].copy_(part[name])
        return merged

    def take(self, index: Tensor) -> Tensor:
        """The coordinates at `index` (int64 [m], or a bool mask [size]) as a tensor [m]."""
        return self.flat[index]

    def put(self, index: Tensor, values: Tensor) -> Vector:
        """This vector with `values` [m] at `index` (int64 [m], or a bool mask [size] with m ones)."""
        flat = self.flat.clone()
        flat[index] = values
        return self._new(flat)

    def where(self, mask: Tensor, other: Vector | float = 0.0) -> Vector:
        """This vector where `mask` (bool [size]) holds, elsewhere `other`."""
        if isinstance(other, Vector):
            return self._with(other, lambda mine, its: torch.where(mask, mine, its))
        return self._new(torch.where(mask, self.flat, other))

    def __repr__(self) -> str:
        return f"Vector({self.layout}, {self.flat.dtype}, {self.flat.device})"
