"""A pipeline of stages: each takes numbers [n] and leaves fewer, or shorter ones, to the stages after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedloom.errors import CodecError
from fedloom.message import Value

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Desk:
    """Where a client packs: its draws, what it remembers for these numbers, and whether errors are fed back."""

    draw: Callable[[], torch.Generator]
    warm: list[Tensor]  # what a stage wants to find again next time
    feedback: bool


@dataclass(frozen=True)
class Compressor:
    """One step. Stages stand in the order of `place`: low rank, then sparse, then few bits."""

    place: ClassVar[int]
    ef: bool | None = None  # whether errors are fed back; None: as the kind of stage needs it

    @property
    def biased(self) -> bool:
        """Whether the expected result is not the numbers themselves, so that errors should be fed back."""
        return False

    def pack(self, x: Tensor, shapes: Shapes, desk: Desk, rest: Sequence[Compressor]) -> Value:
        """What travels in place of the numbers x [n], which are entries of these shapes one after another."""
        raise NotImplementedError

    def unpack(self, wire: Any, shapes: Shapes, rest: Sequence[Compressor]) -> Tensor:
        """The numbers [n] that the other side makes of it; raises CodecError for what `pack` never makes."""
        raise NotImplementedError


def packed(stages: Sequence[Compressor], x: Tensor, shapes: Shapes, desk: Desk) -> Value:
    """What travels in place of x [n] through these stages."""
    return stages[0].pack(x, shapes, desk, stages[1:]) if stages else x


def unpacked(stages: Sequence[Compressor], wire: Any, shapes: Shapes) -> Tensor:
    """The inverse of `packed`, as far as there is one."""
    if stages:
        return stages[0].unpack(wire, shapes, stages[1:])
    demand(isinstance(wire, Tensor) and wire.is_floating_point() and wire.shape == (total(shapes),), "numbers")
    return wire


def total(shapes: Shapes) -> int:
    """How many numbers entries of these shapes have."""
    return sum(map(math.prod, shapes))


def demand(holds: bool, what: str) -> None:
    """Raises CodecError unless a part of a compressed value is what it must be."""
    if not holds:
        raise CodecError(f"a compressed value with wrong {what}")


def parts(wire: Any, count: int) -> list[Any]:
    """The parts of a wire form that is a list of so many."""
    demand(isinstance(wire, list) and len(wire) == count, "parts")
    return list(wire)
