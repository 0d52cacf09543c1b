"""Fixed-point numbers mod 2^k, with k and the scales so chosen that no sum of a cohort wraps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import UsageError

Lanes = NDArray[Any]  # whole numbers mod 2^k, in uint32 (k <= 32) or uint64
Doubles = NDArray[np.float64]
LEVELS = 128  # a number at the edge of the range has at least so many steps, or the request is refused


@dataclass(frozen=True)
class FixedPoint:
    """How sums over at most `clients` of weight times number, and of weight, are written as whole numbers mod 2^bits.

    A number x with |x| <= clip and a weight 0 <= w <= weight becomes round(w x scale), a weight round(w weight_scale).
    Both scales are the largest powers of two for which the sums of all clients stay below 2^(bits - 1): nothing wraps,
    and whole weights are exact. Raises UsageError where so few bits are left that the sum would mean little.
    """

    bits: int
    clients: int
    clip: float
    weight: float

    def __post_init__(self) -> None:
        usual = min(1.0, self.weight)
        if usual * self.clip * self.scale < LEVELS or usual * self.weight_scale < 1:
            raise UsageError(
                f"{self.bits} bits are too few for a secure sum of {self.clients} clients with numbers up to "
                f"{self.clip:g} and weights up to {self.weight:g}: give it more bits, or a smaller range of weights"
            )

    @cached_property
    def scale(self) -> float:
        """Steps a unit of weight times number."""
        return self._largest(self.weight * self.clip)

    @cached_property
    def weight_scale(self) -> float:
        """Steps a unit of weight."""
        return self._largest(self.weight)

    def _largest(self, most: float) -> float:
        """The largest power of two such that `clients` numbers up to `most`, rounded, sum to less than 2^(bits-1)."""
        room = Fraction(2 ** (self.bits - 1) - 1, self.clients) - Fraction(1, 2)
        ratio = room / Fraction(most)
        if ratio <= 0:
            return 0.0
        power = math.floor(math.log2(ratio)) + 1  # the logarithm is rounded
        while Fraction(2) ** power > ratio:
            power -= 1
        return 2.0**power

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint32 if self.bits <= 32 else np.uint64)

    def encoded(self, numbers: Doubles, scale: float) -> Lanes:
        """round(numbers * scale) mod 2^bits; the caller has seen to the range."""
        whole = np.rint(numbers * scale).astype(np.int64)  # a power of two: the product is exact
        return self.reduced(whole.astype(self.dtype))

    def reduced(self, lanes: Lanes) -> Lanes:
        """The lanes mod 2^bits, in place: sums of lanes wrap at the lane's own width."""
        if self.bits < 8 * lanes.itemsize:
            lanes &= lanes.dtype.type((1 << self.bits) - 1)
        return lanes

    def whole(self, lanes: Lanes) -> NDArray[np.int64]:
        """The signed whole numbers that lanes mod 2^bits stand for."""
        signed = self.reduced(lanes.copy()).astype(np.int64)  # uint64 keeps its bits
        spare = 64 - self.bits
        return signed << spare >> spare if spare else signed

    def decoded(self, lanes: Lanes, scale: float) -> Doubles:
        """What `encoded` made lanes of, or the sum of such lanes."""
        return self.whole(lanes).astype(np.float64) / scale

    def error(self, weight: float, count: int) -> float:
        """A bound on what rounding to steps takes the mean of `count` numbers of that total weight off the exact one.

        Each client is off by at most half a step, in w x and in w: (count / 2) (1/scale + clip/weight_scale) / weight.
        The second term is zero where the weights are whole numbers.
        """
        return count / 2 * (1 / self.scale + self.clip / self.weight_scale) / weight if weight else math.inf

    def to_bytes(self, lanes: Lanes) -> bytes:
        """The lanes little-endian, bits / 8 bytes each (bits a multiple of 8)."""
        width = lanes.itemsize
        octets = np.ascontiguousarray(lanes).view(np.uint8).reshape(-1, width)
        return octets[:, : self.bits // 8].tobytes()

    def from_bytes(self, data: bytes) -> Lanes:
        """The lanes that `to_bytes` wrote."""
        octets = np.zeros((len(data) // (self.bits // 8), self.dtype.itemsize), np.uint8)
        octets[:, : self.bits // 8] = np.frombuffer(data, np.uint8).reshape(len(octets), -1)
        return octets.view(self.dtype).reshape(-1)
