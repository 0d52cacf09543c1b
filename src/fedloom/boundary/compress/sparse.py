"""A few of the coordinates of the whole vector: the largest, or random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.boundary.compress.compressor import Compressor, Desk, Shapes, demand, packed, parts, total, unpacked
from fedloom.errors import UsageError
from fedloom.message import Packed, Seed, Value
from fedloom.random import numpy_stream
from fedloom.wire import packed_size


@dataclass(frozen=True)
class Sparse(Compressor):
    """Keeps the share k/n of the coordinates; the others are taken for zero."""

    place = 1
    share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"compress: {type(self).__name__.lower()}:{self.share}; it is a share over 0, at most 1")

    @property
    def biased(self) -> bool:
        return self.share < 1

    def kept(self, n: int) -> int:
        """k of n coordinates, at least one."""
        return max(1, math.ceil(self.share * n - 1e-9))

    def _filled(self, index: Tensor, values: Tensor, n: int) -> Tensor:
        x = values.new_zeros(n)
        x[index] = values
        return x


@dataclass(frozen=True)
class TopK(Sparse):
    """The k coordinates of largest size. |C(x) - x|^2 <= (1 - k/n) |x|^2 (Stich et al. 2018, arXiv 1809.07599)."""

    def pack(self, x: Tensor, shapes: Shapes, desk: Desk, rest: Sequence[Compressor]) -> Value:
        n, k = len(x), self.kept(len(x))
        if k == n:
            return [None, packed(rest, x, ((n,),), desk)]
        index = x.abs().topk(k).indices.sort().values
        return [places(index, n), packed(rest, x[index], ((k,),), desk)]

    def unpack(self, wire: Any, shapes: Shapes, rest: Sequence[Compressor]) -> Tensor:
        n = total(shapes)
        k = self.kept(n)
        where, inner = parts(wire, 2)
        values = unpacked(rest, inner, ((k,),))
        return values if k == n else self._filled(placed(where, k, n).to(values.device), values, n)


@dataclass(frozen=True)
class RandK(Sparse):
    """k random coordinates, sent as the seed that they are drawn from.

    Without error feedback times n/k: E C(x) = x and E |C(x) - x|^2 = (n/k - 1) |x|^2. With it as they are:
    E |C(x) - x|^2 = (1 - k/n) |x|^2 (Stich et al. 2018, arXiv 1809.07599).
    """

    def pack(self, x: Tensor, shapes: Shapes, desk: Desk, rest: Sequence[Compressor]) -> Value:
        n, k = len(x), self.kept(len(x))
        if k == n:
            return [None, packed(rest, x, ((n,),), desk)]
        seed = Seed(int(torch.randint(2**62, (), generator=desk.draw())))
        values = x[drawn(seed, k, n).to(x.device)]
        return [seed, packed(rest, values if desk.feedback else values * (n / k), ((k,),), desk)]

    def unpack(self, wire: Any, shapes: Shapes, rest: Sequence[Compressor]) -> Tensor:
        n = total(shapes)
        k = self.kept(n)
        seed, inner = parts(wire, 2)
        values = unpacked(rest, inner, ((k,),))
        if k == n:
            return values
        demand(isinstance(seed, Seed), "seed")
        return self._filled(drawn(seed, k, n).to(values.device), values, n)


def drawn(seed: Seed, k: int, n: int) -> Tensor:
    """k of n places, each set of them equally likely, int64 [k] ascending: the same on every machine."""
    chosen = numpy_stream(seed.value, "compress", "randk").choice(n, k, replace=False, shuffle=False)
    return torch.from_numpy(chosen).sort().values


def places(index: Tensor, n: int) -> Value:
    """Ascending places (int64 [k], below n) in the shorter of two codes: a mask of n bits, or Elias-Fano.

    Elias-Fano: the low bits of each place as they are; of the rest h_i the mask that has its i-th one at h_i + i. That
    is about log2(n/k) + 2 bits a place, where a list of places takes log2(n).
    """
    k = len(index)
    low = _low_bits(k, n)
    if _bytes(k, n, low) >= packed_size(n, 1):
        mask = torch.zeros(n, dtype=torch.bool, device=index.device)
        mask[index] = True
        return Packed(mask, 1)
    high = torch.zeros(_high_bits(k, n, low), dtype=torch.bool, device=index.device)
    high[(index >> low) + torch.arange(k, device=index.device)] = True
    return [Packed(index & ((1 << low) - 1), low) if low else None, Packed(high, 1)]


def placed(wire: Any, k: int, n: int) -> Tensor:
    """The inverse of `places`."""
    if isinstance(wire, Packed):
        demand(wire.values.dtype == torch.bool and wire.values.shape == (n,), "mask")
        index = wire.values.nonzero().squeeze(1)
        demand(len(index) == k, "mask")
        return index
    lower, upper = parts(wire, 2)
    low = _low_bits(k, n)
    demand(isinstance(upper, Packed) and upper.values.dtype == torch.bool, "places")
    demand(upper.values.shape == (_high_bits(k, n, low),), "places")
    high = upper.values.nonzero().squeeze(1)
    demand(len(high) == k, "places")
    index = (high - torch.arange(k, device=high.device)) << low
    if low:
        demand(isinstance(lower, Packed) and lower.bits == low and lower.values.shape == (k,), "places")
        index = index | lower.values.to(torch.int64)
    demand(bool((index[1:] > index[:-1]).all()) and int(index[-1]) < n, "places")
    return index


def _low_bits(k: int, n: int) -> int:
    return min(range(32), key=lambda low: _bytes(k, n, low))


def _high_bits(k: int, n: int, low: int) -> int:
    return k + ((n - 1) >> low)


def _bytes(k: int, n: int, low: int) -> int:
    return packed_size(k, low) + packed_size(_high_bits(k, n, low), 1)
