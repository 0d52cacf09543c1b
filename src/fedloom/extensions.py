"""What msgpack lacks: tensors, vectors and the wire types, each written and read here.

An extension is a short header in msgpack, then the raw little-endian numbers up to its end. A further type is a line of
`EXTENSIONS`, with how it is written and read; `fedloom.message` says what it is.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import CodecError
from fedloom.message import DTYPE_NAMES, DTYPES, Packed, Seed, Sparse, Value, array_of, octets_of
from fedloom.vector import Layout, Vector
from fedloom.wire import Reader, head, pack, packed_size, text

if sys.byteorder != "little":
    raise ImportError("fedloom sends numbers as they lie in memory, little-endian; this machine is big-endian")

MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class Deferred:
    """Bytes that are counted now and made only when the message is: counting tensors costs no copy."""

    size: int
    make: Callable[[], bytes | memoryview]

    def __len__(self) -> int:
        return self.size


Chunk: TypeAlias = bytes | Deferred


def plain(flat: Tensor) -> bool:
    """Whether a vector's numbers may cross: what `_dtype` and `_raw_tensor` ask."""
    return (
        not flat.requires_grad
        and flat.layout is torch.strided
        and flat.dtype in DTYPE_NAMES
        and not (flat.is_nested or flat.is_meta)
    )


def vector_size(layout: Layout, dtype: torch.dtype, numbers: int) -> int:
    """Bytes of a vector's extension behind its head, `numbers` those of its numbers."""
    return len(_layout(layout)) + len(text(DTYPE_NAMES[dtype])) + numbers


# Writing: the chunks behind the head of the extension.


def _write_tensor(value: Tensor) -> tuple[Chunk, ...]:
    return _dtype(value) + _shape(value), _raw_tensor(value)


def _write_vector(value: Vector) -> tuple[Chunk, ...]:
    return _layout(value.layout), _dtype(value.flat), _raw_tensor(value.flat)


def _write_sparse(value: Sparse) -> tuple[Chunk, ...]:
    bits = _index_bits(len(value.index), value.size)
    size = packed_size(len(value.index), bits) if bits else packed_size(value.size, 1)
    header = head("int", value.size) + _dtype(value.values) + _shape(value.values)
    return header, Deferred(size, lambda: _packed_index(value, bits)), _raw_tensor(value.values)


def _write_packed(value: Packed) -> tuple[Chunk, ...]:
    header = _dtype(value.values) + head("int", value.bits) + _shape(value.values)
    size = packed_size(value.values.numel(), value.bits)
    return header, Deferred(size, lambda: pack(array_of(value.values), value.bits))


def _write_seed(value: Seed) -> tuple[Chunk, ...]:
    return (head("int", value.value),)


def _dtype(tensor: Tensor) -> bytes:
    if tensor.dtype not in DTYPE_NAMES:
        raise CodecError(f"a tensor of {tensor.dtype} may not cross")
    return _dtype_name(tensor.dtype)


@lru_cache(maxsize=64)
def _dtype_name(dtype: torch.dtype) -> bytes:
    return text(DTYPE_NAMES[dtype])


def _shape(tensor: Tensor) -> bytes:
    if tensor.dim() > MAX_DIMS:
        raise CodecError(f"a tensor of {tensor.dim()} dimensions may not cross; the limit is {MAX_DIMS}")
    return _extents(tuple(tensor.shape))


def _extents(shape: tuple[int, ...]) -> bytes:
    if why := _beyond(shape):
        raise CodecError(why)
    return b"".join((head("list", len(shape)), *(head("int", extent) for extent in shape)))


@lru_cache(maxsize=256)
def _layout(layout: Layout) -> bytes:
    names = b"".join((head("list", len(layout.names)), *map(text, layout.names)))
    shapes = b"".join((head("list", len(layout.shapes)), *map(_extents, layout.shapes)))
    blob = names + shapes + head("int", layout.parameters)
    return head("bytes", len(blob)) + blob


def _raw_tensor(tensor: Tensor) -> Deferred:
    if tensor.requires_grad:
        raise CodecError("a tensor that requires grad may not cross: detach it")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        raise CodecError(f"a tensor of layout {tensor.layout} on {tensor.device} may not cross: make it dense")
    return Deferred(tensor.numel() * tensor.element_size(), lambda: array_of(octets_of(tensor)).data)


def _packed_index(sparse: Sparse, bits: int) -> bytes:
    if bits:
        return pack(array_of(sparse.index), bits)
    mask = np.zeros(sparse.size, bool)
    mask[array_of(sparse.index)] = True
    return pack(mask, 1)


def _index_bits(count: int, size: int) -> int:
    """Bits of a number in a Sparse's index of `count` of `size` places; 0 where a mask of all places is shorter."""
    bits = max(1, (size - 1).bit_length())
    return bits if packed_size(count, bits) <= packed_size(size, 1) else 0


# Reading: each function takes a reader that stands where what is behind the head of the extension begins.


def _read_tensor(reader: Reader) -> Tensor:
    return _read_numbers(reader, _read_dtype(reader), _read_shape(reader))


def _read_dtype(reader: Reader) -> torch.dtype:
    name = reader.text(reader.number("str"))
    if name not in DTYPES:
        raise reader.bad(f"unknown dtype {name!r}")
    return DTYPES[name]


def _read_shape(reader: Reader) -> tuple[int, ...]:
    dims = reader.number("list")
    if dims > MAX_DIMS:
        raise reader.bad(f"a tensor of {dims} dimensions; the limit is {MAX_DIMS}")
    shape = tuple(reader.size() for _ in range(dims))
    if why := _beyond(shape):
        raise reader.bad(why)
    return shape


def _beyond(shape: tuple[int, ...]) -> str:
    """Why there is no tensor of a shape: strides in bytes must stay below 2**63."""
    large = math.prod(max(extent, 1) for extent in shape) >= 1 << 59
    return f"a tensor of shape {list(shape)}, which no machine holds" if large else ""


def _read_numbers(reader: Reader, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    octets = reader.copy(math.prod(shape) * dtype.itemsize)
    flat = torch.frombuffer(octets, dtype=torch.uint8) if len(octets) else torch.empty(0, dtype=torch.uint8)
    if dtype == torch.bool and len(octets) and flat.max() > 1:
        raise reader.bad("a bool tensor with a byte other than 0 and 1")
    return flat.view(dtype).reshape(shape)


def _read_vector(reader: Reader) -> Vector:
    blob = bytes(reader.take(reader.number("bytes")))
    layout = (_read_layout if len(blob) <= 1 << 16 else _read_layout.__wrapped__)(blob)
    dtype = _read_dtype(reader)
    if not dtype.is_floating_point:
        raise reader.bad(f"a Vector of {dtype}; its numbers are floating point")
    return Vector(_read_numbers(reader, dtype, (layout.size,)), layout, readonly=True)


@lru_cache(maxsize=64)  # vectors of one layout share one object; large layouts go past the cache: a stranger sends many
def _read_layout(blob: bytes) -> Layout:
    reader = Reader(memoryview(blob), 0, len(blob), 0, itertools.repeat(0))
    names = tuple(reader.text(reader.number("str")) for _ in range(reader.number("list")))
    shapes = tuple(_read_shape(reader) for _ in range(reader.number("list")))
    parameters = reader.size()
    reader.finish()
    if not len(set(names)) == len(names) == len(shapes) >= parameters:
        raise reader.bad(
            f"a layout of {len(names)} names ({len(set(names))} different), {len(shapes)} shapes and "
            f"{parameters} parameters contradicts itself"
        )
    return Layout(names, shapes, parameters)


def _read_sparse(reader: Reader) -> Sparse:
    size, dtype, shape = reader.size(), _read_dtype(reader), _read_shape(reader)
    if not shape or shape[0] > size:
        raise reader.bad(f"a Sparse of size {size} with values of shape {list(shape)}")
    if size * math.prod(shape[1:]) * dtype.itemsize > reader.expanded:
        raise reader.bad(f"a Sparse of size {size} is over the limit of {reader.expanded} bytes as a dense tensor")
    bits = _index_bits(shape[0], size)
    index = reader.integers(shape[0], bits).astype(np.int64) if bits else reader.integers(size, 1).nonzero()[0]
    return Sparse(torch.from_numpy(index), _read_numbers(reader, dtype, shape), size)


def _read_packed(reader: Reader) -> Packed:
    dtype, bits, shape = _read_dtype(reader), reader.size(), _read_shape(reader)
    if dtype.is_floating_point or dtype.is_complex or not 1 <= bits <= 32:
        raise reader.bad(f"a Packed of {dtype} with {bits} bits")
    count = math.prod(shape)
    if count * dtype.itemsize > reader.expanded:
        raise reader.bad(f"a Packed of shape {list(shape)} is over the limit of {reader.expanded} bytes in memory")
    array = reader.integers(count, bits)
    most = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    if count and array.max() > most:
        raise reader.bad(f"a Packed holds {array.max()}, too much for its {dtype}")
    return Packed(torch.from_numpy(array.astype(DTYPE_NAMES[dtype])).reshape(shape), bits)


def _read_seed(reader: Reader) -> Seed:
    return Seed(reader.size())


EXTENSIONS: dict[type, tuple[int, Callable[[Any], tuple[Chunk, ...]], Callable[[Reader], Value]]] = {
    Tensor: (2, _write_tensor, _read_tensor),
    Vector: (3, _write_vector, _read_vector),
    Sparse: (4, _write_sparse, _read_sparse),
    Packed: (5, _write_packed, _read_packed),
    Seed: (6, _write_seed, _read_seed),
}
