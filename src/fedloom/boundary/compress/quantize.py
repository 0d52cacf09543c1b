"""Fewer bits a number. Numbers are taken in blocks of `block`, in the order of the flat vector; each has its scale.

Where errors are fed back, the scale of a block is the one that brings the result nearest to the numbers: least squares.
Then |C(x) - x|^2 = |x|^2 - <x, y>^2 / |y|^2 for what would have been y, so that any number of bits contracts. Without,
QSGD of few bits would add more noise than there is signal, and the error that is fed back would grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedloom.boundary.compress.compressor import Compressor, Desk, Shapes, demand, parts, total
from fedloom.errors import UsageError
from fedloom.message import Packed, Value


@dataclass(frozen=True)
class Quantizer(Compressor):
    """Codes of a few bits for every number, and `scales` floats for every block."""

    place = 2
    scales: ClassVar[int] = 1

    bits: int = 8
    block: int = 512  # numbers that share a scale, as in the experiments of QSGD; 0: all

    def __post_init__(self) -> None:
        least = 2 if isinstance(self, QSGD) else 1
        if not least <= self.bits <= 8:
            name = type(self).__name__.lower()
            raise UsageError(f"compress: {name}:{self.bits}; it takes {least} to 8 bits a number")
        if self.block < 0:
            raise UsageError(f"compress: block={self.block}; it is a number of numbers, or 0 for all")

    def code(self, rows: Tensor, real: Tensor, desk: Desk) -> tuple[Tensor, Tensor]:
        """Codes [B, b] from 0 to below 2**bits and scales [B, s] of blocks [B, b]; `real` is False in the padding."""
        raise NotImplementedError

    def value(self, codes: Tensor, scales: Tensor) -> Tensor:
        """What the codes [B, b] of blocks with scales [B, s] stand for, [B, b]; linear in the scales."""
        raise NotImplementedError

    def pack(self, x: Tensor, shapes: Shapes, desk: Desk, rest: Sequence[Compressor]) -> Value:
        rows = self._rows(x)
        real = (torch.arange(rows.numel(), device=x.device) < len(x)).view_as(rows)
        codes, scales = self.code(rows, real, desk)
        if desk.feedback:
            y = self.value(codes, scales) * real
            square = (y * y).sum(1, keepdim=True)
            scales = torch.where(square > 0, (rows * y).sum(1, keepdim=True) / square, 0.0) * scales
        return [Packed(codes.flatten()[: len(x)].to(torch.uint8), self.bits), scales]

    def unpack(self, wire: Any, shapes: Shapes, rest: Sequence[Compressor]) -> Tensor:
        n = total(shapes)
        codes, scales = parts(wire, 2)
        demand(isinstance(codes, Packed) and codes.bits == self.bits and codes.values.shape == (n,), "codes")
        rows = self._rows(codes.values)
        demand(isinstance(scales, Tensor) and scales.is_floating_point(), "scales")
        demand(scales.shape == (len(rows), self.scales), "scales")
        return self.value(rows.to(scales.dtype), scales).flatten()[:n]

    def _rows(self, x: Tensor) -> Tensor:
        """Numbers [n] in blocks [B, b]; the last block is filled with copies of the last number."""
        size = min(self.block or len(x), len(x))
        return torch.cat([x, x[-1:].expand(-len(x) % size)]).view(-1, size)


@dataclass(frozen=True)
class QSGD(Quantizer):
    """Unbiased rounding of |x_i| / |x| to one of s levels (Alistarh et al. 2017, arXiv 1610.02132).

    With the sign, b bits hold s = 2**(b-1) - 1. E |Q(x) - x|^2 <= min(d / s^2, sqrt(d) / s) |x|^2 for blocks of d.
    """

    bits: int = 4
    norm: Literal["l2", "max"] = "l2"  # the Euclidean length, or the largest size: less noise, no bound in the paper

    @property
    def levels(self) -> int:
        """s."""
        return 2 ** (self.bits - 1) - 1

    def code(self, rows: Tensor, real: Tensor, desk: Desk) -> tuple[Tensor, Tensor]:
        rows = rows * real
        order = 2 if self.norm == "l2" else torch.inf
        norm = torch.linalg.vector_norm(rows, order, dim=1, keepdim=True)
        part = torch.where(norm > 0, rows.abs() / norm, 0.0) * self.levels
        level = (part + uniform(rows, desk)).floor().clamp(max=self.levels)
        return self.levels + rows.sign() * level, norm

    def value(self, codes: Tensor, scales: Tensor) -> Tensor:
        return (codes - self.levels) / self.levels * scales


@dataclass(frozen=True)
class Uniform(Quantizer):
    """2**bits levels at equal distances from a block's least to its largest number; unbiased if stochastic.

    The error of a number is below the distance D = (largest - least) / (2**bits - 1); stochastic, its variance is at
    most D^2 / 4; to the nearest level, the error is at most D / 2.
    """

    scales = 2
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    @property
    def biased(self) -> bool:
        return self.rounding == "nearest"

    def code(self, rows: Tensor, real: Tensor, desk: Desk) -> tuple[Tensor, Tensor]:
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        most, width = 2**self.bits - 1, high - low
        part = torch.where(width > 0, (rows - low) / width, 0.0) * most
        code = part.round() if self.biased else (part + uniform(rows, desk)).floor()
        return code.clamp(0, most), torch.cat([low, high], 1)

    def value(self, codes: Tensor, scales: Tensor) -> Tensor:
        low, high = scales[:, :1], scales[:, 1:]
        return low + codes * ((high - low) / (2**self.bits - 1))


@dataclass(frozen=True)
class Sign(Quantizer):
    """The sign times the block's mean size: |C(x) - x|^2 = |x|^2 - |x|_1^2 / d (EF-SignSGD, arXiv 1901.09847)."""

    bits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 1:
            raise UsageError(f"compress: sign:{self.bits}; a sign is one bit, write sign")

    @property
    def biased(self) -> bool:
        return True

    def code(self, rows: Tensor, real: Tensor, desk: Desk) -> tuple[Tensor, Tensor]:
        size = (rows.abs() * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return (rows >= 0).to(rows.dtype), size

    def value(self, codes: Tensor, scales: Tensor) -> Tensor:
        return (2 * codes - 1) * scales


@dataclass(frozen=True)
class Half(Compressor):
    """Two bytes a number: rounded to the nearest; what is too large for the format becomes its largest."""

    place = 2
    dtype: ClassVar[torch.dtype]

    def pack(self, x: Tensor, shapes: Shapes, desk: Desk, rest: Sequence[Compressor]) -> Value:
        most = torch.finfo(self.dtype).max
        return x.clamp(-most, most).to(self.dtype)

    def unpack(self, wire: Any, shapes: Shapes, rest: Sequence[Compressor]) -> Tensor:
        demand(isinstance(wire, Tensor) and wire.dtype == self.dtype and wire.shape == (total(shapes),), "numbers")
        return wire.float()


@dataclass(frozen=True)
class FP16(Half):
    """11 bits of precision, from 6e-8 to 65504."""

    dtype = torch.float16


@dataclass(frozen=True)
class BF16(Half):
    """8 bits of precision, float32's range."""

    dtype = torch.bfloat16


def uniform(like: Tensor, desk: Desk) -> Tensor:
    """Draws from [0, 1) in the shape of `like`; the generator is the processor's, whatever the device."""
    return torch.rand(like.shape, generator=desk.draw(), dtype=like.dtype).to(like.device)
