"""Zstandard over what the stages before it have left: not a bit of the result changes."""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.boundary.compress.compressor import demand
from fedloom.errors import UsageError
from fedloom.message import Packed, octets_of

DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "uint8", "int16", "int32", "int64", "bool")
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST = 2**31  # bytes of one tensor


@dataclass(frozen=True)
class Zstd:
    """Tensors and codes as one compressed string each, where that is shorter. Needs Python 3.14, or the extra `zstd`.

    Bytes are sorted by their place in a number first: exponents compress well among themselves, and mantissas hardly.
    """

    level: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 22:
            raise UsageError(f"compress: zstd:{self.level}; the level is from 1 to 22")
        library()

    def squeeze(self, wire: Any) -> Any:
        """The same wire form, with tuples for what became shorter."""
        if isinstance(wire, list):
            return [self.squeeze(part) for part in wire]
        if isinstance(wire, Packed):
            tensor, bits, plain = wire.values, wire.bits, (wire.values.numel() * wire.bits + 7) // 8
        elif isinstance(wire, Tensor):
            tensor, bits, plain = wire, 0, wire.numel() * wire.element_size()
        else:
            return wire
        narrow = tensor.to(torch.uint8) if bits and bits <= 8 else tensor
        data = library().compress(_shuffled(narrow), self.level)
        header = 24  # of the tuple, at most, beside what a tensor has too
        shorter = len(data) + header < plain
        return (data, NAMES[tensor.dtype], bits, list(tensor.shape)) if shorter else wire

    def expand(self, wire: Any, most: int = LARGEST) -> Any:
        """The inverse of `squeeze`; CodecError for what would be over `most` bytes in all, before they exist."""
        return self._expanded(wire, [most])

    def _expanded(self, wire: Any, left: list[int]) -> Any:
        if isinstance(wire, list):
            return [self._expanded(part, left) for part in wire]
        if not isinstance(wire, tuple):
            return wire
        demand(len(wire) == 4 and isinstance(wire[0], bytes) and wire[1] in DTYPES, "compressed numbers")
        data, name, bits, shape = wire
        demand(isinstance(bits, int) and 0 <= bits <= 32 and isinstance(shape, list), "compressed numbers")
        demand(all(isinstance(extent, int) and extent >= 0 for extent in shape), "shape")
        dtype = torch.uint8 if bits and bits <= 8 else DTYPES[name]
        size = math.prod(shape) * dtype.itemsize
        left[0] -= math.prod(shape) * max(dtype.itemsize, DTYPES[name].itemsize)
        demand(left[0] >= 0, "shape")
        octets = bytearray(library().expand(data, size))
        demand(len(octets) == size > 0, "compressed numbers")
        numbers = torch.frombuffer(octets, dtype=torch.uint8).view(dtype.itemsize, -1).T.contiguous().view(-1)
        tensor = numbers.view(dtype).reshape(shape)
        return Packed(tensor.to(DTYPES[name]), bits) if bits else tensor


def _shuffled(tensor: Tensor) -> bytes:
    return octets_of(tensor).view(-1, tensor.itemsize).T.contiguous().numpy().tobytes()


class _Package:
    """The package `zstandard`."""

    @staticmethod
    def compress(data: bytes, level: int) -> bytes:
        import zstandard

        return zstandard.ZstdCompressor(level=level).compress(data)

    @staticmethod
    def expand(data: bytes, most: int) -> bytes:
        import zstandard

        try:
            # Not `decompress`: it trusts the size that the data claim.
            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                return reader.read(most + 1)
        except zstandard.ZstdError:
            return b""


class _Builtin:
    """Python's own, from 3.14 on."""

    @staticmethod
    def compress(data: bytes, level: int) -> bytes:
        compressed: bytes = importlib.import_module("compression.zstd").compress(data, level)
        return compressed

    @staticmethod
    def expand(data: bytes, most: int) -> bytes:
        zstd = importlib.import_module("compression.zstd")
        try:
            expanded: bytes = zstd.ZstdDecompressor().decompress(data, max_length=most + 1)
        except zstd.ZstdError:
            return b""
        return expanded


def library() -> type[_Package] | type[_Builtin]:
    """What compresses here."""
    if importlib.util.find_spec("zstandard"):
        return _Package
    if importlib.util.find_spec("compression") and importlib.util.find_spec("compression.zstd"):
        return _Builtin
    raise UsageError("compress: zstd needs the extra: pip install 'fedloom[zstd]'")
