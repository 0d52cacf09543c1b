"""Matrices as products of two thin ones (PowerSGD: Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.boundary.compress.compressor import Compressor, Desk, Shapes, packed, total, unpacked
from fedloom.errors import UsageError
from fedloom.message import Value


@dataclass(frozen=True)
class LowRank(Compressor):
    """Every matrix M [a, b] becomes P [a, r] with orthonormal columns and Q = M' P [b, r]; P Q' stands for it.

    P spans M Q of the Q that the client sent last (at first a random one), so that one step of the power iteration a
    round finds the leading directions. A convolution is the matrix [out, rest]; entries with one axis, and matrices
    that two factors would not shorten, travel as they are. P P' is a projection: |C(M) - M| <= |M|.

    Departure: in the paper all workers share one P; here a client's P is its own, since clients are not always there.
    """

    place = 0
    rank: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"compress: lowrank:{self.rank}; a rank is at least 1")

    @property
    def biased(self) -> bool:
        return True

    def pack(self, x: Tensor, shapes: Shapes, desk: Desk, rest: Sequence[Compressor]) -> Value:
        left, fresh, factors, bare = iter(list(desk.warm)), [], [], []
        for entry, shape in zip(x.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
            if not self._splits(shape):
                bare.append(entry)
                continue
            m = entry.view(shape[0], -1)
            q = next(left, None)
            if q is None or q.shape != (m.shape[1], self.rank):
                q = torch.randn(m.shape[1], self.rank, generator=desk.draw(), dtype=x.dtype).to(x.device)
            p = torch.linalg.qr(m @ q).Q
            q = m.T @ p
            fresh.append(q)
            factors += [p.reshape(-1), q.reshape(-1)]
        desk.warm[:] = fresh
        numbers = torch.cat(factors + bare)
        return packed(rest, numbers, ((len(numbers),),), desk)

    def unpack(self, wire: Any, shapes: Shapes, rest: Sequence[Compressor]) -> Tensor:
        sizes = [
            size for shape in shapes if self._splits(shape) for size in (shape[0] * self.rank, _wide(shape) * self.rank)
        ]
        bare = total(tuple(shape for shape in shapes if not self._splits(shape)))
        numbers = unpacked(rest, wire, ((sum(sizes) + bare,),))
        *factors, tail = numbers.split([*sizes, bare])
        left, at, entries = iter(factors), 0, []
        for shape in shapes:
            if self._splits(shape):
                p, q = next(left).view(-1, self.rank), next(left).view(-1, self.rank)
                entries.append((p @ q.T).reshape(-1))
            else:
                entries.append(tail[at : at + math.prod(shape)])
                at += math.prod(shape)
        return torch.cat(entries)

    def _splits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and (shape[0] + _wide(shape)) * self.rank < math.prod(shape)


def _wide(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])
