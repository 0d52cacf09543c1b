"""The bytes of a message.

They are `MHM`, a version byte, and one map in canonical msgpack (`fedloom.wire`). What msgpack lacks is an
extension: a short header in msgpack, then the raw little-endian numbers up to its end.

    1  tuple   list of its items
    2  tensor  dtype, shape; numbers
    3  Vector  layout (bin: names, shapes, how many are parameters), dtype; numbers
    4  Sparse  size, dtype and shape of the values; index, numbers
    5  Packed  dtype, bits, shape; bits
    6  Seed    value

A message has one encoding: what `decode` accepts encodes to the very bytes that came, so a hash of them names a value.
"""

from __future__ import annotations

import itertools
import math
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import CodecError
from fedloom.message import DTYPE_NAMES, DTYPES, Packed, Seed, Sparse, Value, array_of, octets_of
from fedloom.vector import Layout, Vector
from fedloom.wire import Reader, head, pack, packed_size

if sys.byteorder != "little":
    raise ImportError("fedloom sends numbers as they lie in memory, little-endian; this machine is big-endian")

MAGIC = b"MHM"
VERSION = 1
MAX_DEPTH = 16  # lists, tuples and dicts inside one another
MAX_DIMS = 64
_TOO_DEEP = f"more than {MAX_DEPTH} lists, tuples or dicts inside one another"
_TUPLE, _TENSOR, _VECTOR, _SPARSE, _PACKED, _SEED = range(1, 7)


def encode(message: Mapping[str, Value]) -> bytes:
    """The bytes of a message. A value that may not cross raises CodecError, which says in which field it stands."""
    return _joined([_start(len(message)), *(chunk for _, chunks in _fields(message) for chunk in chunks)])


def decode(data: bytes | memoryview, limit: int = 2**31, expanded: int = 2**31, parts: int = 2**20) -> dict[str, Value]:
    """The message of these bytes, its tensors writable and on the CPU, its vectors `readonly`.

    Bytes that are not exactly a message raise CodecError and nothing else. `limit` (bytes) bounds the message,
    `expanded` (bytes) what may be larger than its part of the message: a Packed in memory, a Sparse made dense;
    `parts` its lists, tuples, dicts, tensors and the like, with what describes them.
    """
    view = memoryview(data).cast("B")
    if len(view) > limit:
        raise CodecError(f"a message of {len(view)} bytes is over the limit of {limit}")
    if view[:3] != MAGIC:
        raise CodecError(f"not a message: it begins with {bytes(view[:3])!r}, expected {MAGIC!r}")
    if view[3:4] != bytes((VERSION,)):
        raise CodecError(f"a message of version {[*view[3:4]]}, expected [{VERSION}]: another fedloom wrote it")
    reader = Reader(view, 4, len(view), expanded, iter(range(parts)))
    message: dict[str, Value] = _read_dict(reader, reader.number("dict"), 0)
    reader.finish()
    for name in message:
        _check_name(name)
    return message


def sizes(message: Mapping[str, Value]) -> dict[str, int]:
    """Bytes of each field (name and value), and of the fixed part as `envelope`: together `len(encode(message))`.

    No tensor is read or copied. Raises as `encode` does.
    """
    counted = {}
    for name, value in message.items():
        if type(value) is Vector and _plain(value.flat):
            counted[name] = _vector_size(name, value.layout, value.flat.dtype, value.flat.nbytes)
        else:
            counted |= {field: sum(map(len, chunks)) for field, chunks in _fields({name: value})}
    counted["envelope"] = len(_start(len(message)))
    return counted


def check(message: Mapping[str, Value], where: str = "") -> None:
    """Raise CodecError for a message that may not cross; `where` ("reply of client 3") begins its line."""
    try:
        sizes(message)
    except CodecError as error:
        raise CodecError(f"{where}: {error}" if where else str(error)) from None


def same(a: Value, b: Value) -> bool:
    """Whether two values, or two messages, have the same bytes: types, dtypes, layouts, order and NaNs included."""
    return _bytes(a) == _bytes(b)


def _index_bits(count: int, size: int) -> int:
    """Bits of a number in a Sparse's index of `count` of `size` places; 0 where a mask of all places is shorter."""
    bits = max(1, (size - 1).bit_length())
    return bits if packed_size(count, bits) <= packed_size(size, 1) else 0


def _check_name(name: object) -> None:
    if type(name) is not str or not name.isidentifier() or name == "envelope":
        raise CodecError(f"a field is called by an identifier other than 'envelope', not by {name!r}")


# Writing: chunks, those of tensors made last, so that counting them costs no copy.


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Bytes that are counted now and made only when the message is."""

    size: int
    make: Callable[[], bytes | memoryview]

    def __len__(self) -> int:
        return self.size


_Chunk: TypeAlias = bytes | _Numbers


@lru_cache(maxsize=256)
def _start(fields: int) -> bytes:
    return MAGIC + bytes((VERSION,)) + head("dict", fields)


def _fields(message: Mapping[str, Value]) -> Iterator[tuple[str, list[_Chunk]]]:
    for name, value in message.items():
        _check_name(name)
        chunks: list[_Chunk] = [_text(name)]
        try:
            _write(chunks, value, 1)
        except CodecError as error:
            way = " -> ".join((f"field {name!r}", *reversed(getattr(error, "__notes__", ()))))
            raise CodecError(f"{way}: {error}") from None
        yield name, chunks


def _joined(chunks: list[_Chunk]) -> bytes:
    return b"".join(chunk if isinstance(chunk, bytes) else chunk.make() for chunk in chunks)


def _bytes(*values: Value) -> bytes:
    chunks: list[_Chunk] = []
    for value in values:
        _write(chunks, value, 0)
    return _joined(chunks)


def _write(out: list[_Chunk], value: Any, depth: int) -> None:
    """Append the chunks of a value inside `depth` containers. Plain types are exact: a subclass would not come back."""
    kind = type(value)
    if isinstance(value, Tensor):
        _extend(out, _TENSOR, _bytes(_dtype(value), _shape(value)), _numbers(value))
    elif isinstance(value, Vector):
        _extend(out, _VECTOR, _layout(value.layout), _text(_dtype(value.flat)), _numbers(value.flat))
    elif value is None:
        out.append(head("None"))
    elif kind is float:
        out.append(head("float") + struct.pack(">d", value))
    elif kind is int or kind is bool:
        out.append(head(kind.__name__, value))
    elif kind is str or kind is bytes:
        octets = _utf8(value) if isinstance(value, str) else value
        out += head(kind.__name__, len(octets)), octets
    elif kind is list or kind is tuple or kind is dict:
        _write_container(out, value, depth)
    elif isinstance(value, Sparse):
        bits = _index_bits(len(value.index), value.size)
        size = packed_size(len(value.index), bits) if bits else packed_size(value.size, 1)
        header = _bytes(value.size, _dtype(value.values), _shape(value.values))
        _extend(out, _SPARSE, header, _Numbers(size, lambda: _packed_index(value, bits)), _numbers(value.values))
    elif isinstance(value, Packed):
        header = _bytes(_dtype(value.values), value.bits, _shape(value.values))
        size = packed_size(value.values.numel(), value.bits)
        _extend(out, _PACKED, header, _Numbers(size, lambda: pack(array_of(value.values), value.bits)))
    elif isinstance(value, Seed):
        _extend(out, _SEED, _bytes(value.value))
    else:
        raise CodecError(_stranger(kind))


def _write_container(out: list[_Chunk], value: list[Any] | tuple[Any, ...] | dict[Any, Any], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise CodecError(_TOO_DEEP)
    if isinstance(value, tuple):
        items: list[_Chunk] = []
        _write_container(items, list(value), depth)
        _extend(out, _TUPLE, *items)
        return
    out.append(head(type(value).__name__, len(value)))
    place: object = None
    try:
        for place, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict):
                if type(place) is not str and type(place) is not int:
                    raise CodecError(f"a key of type {_full_name(type(place))}; the keys of a dict are str or int")
                _write(out, place, depth + 1)
            _write(out, item, depth + 1)
    except CodecError as error:
        error.add_note(repr(place) if isinstance(value, dict) else f"[{place}]")  # the way, for _fields
        raise


def _extend(out: list[_Chunk], code: int, *body: _Chunk) -> None:
    out += head("extension", sum(map(len, body))) + bytes((code,)), *body


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise CodecError("a str with half a surrogate pair has no UTF-8") from None


def _full_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _stranger(kind: type) -> str:
    if issubclass(kind, np.ndarray | np.generic):
        return f"{_full_name(kind)} may not cross: call .item() for a number, torch.from_numpy for an array"
    known = "None, bool, int, float, str, bytes, tensor, Vector, tuple, list, dict, Sparse, Packed and Seed themselves"
    return f"{_full_name(kind)} may not cross: a message holds {known}"


def _dtype(tensor: Tensor) -> str:
    if tensor.dtype not in DTYPE_NAMES:
        raise CodecError(f"a tensor of {tensor.dtype} may not cross")
    return DTYPE_NAMES[tensor.dtype]


def _shape(tensor: Tensor) -> list[Value]:
    if tensor.dim() > MAX_DIMS:
        raise CodecError(f"a tensor of {tensor.dim()} dimensions may not cross; the limit is {MAX_DIMS}")
    return [*tensor.shape]


def _numbers(tensor: Tensor) -> _Numbers:
    if tensor.requires_grad:
        raise CodecError("a tensor that requires grad may not cross: detach it")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        raise CodecError(f"a tensor of layout {tensor.layout} on {tensor.device} may not cross: make it dense")
    return _Numbers(tensor.numel() * tensor.element_size(), lambda: _octets(tensor))


def _plain(flat: Tensor) -> bool:
    """Whether a vector's numbers may cross: what `_dtype` and `_numbers` ask."""
    return (
        not flat.requires_grad
        and flat.layout is torch.strided
        and flat.dtype in DTYPE_NAMES
        and not (flat.is_nested or flat.is_meta)
    )


@lru_cache(maxsize=1024)
def _vector_size(name: str, layout: Layout, dtype: torch.dtype, numbers: int) -> int:
    """Bytes of a field that is a vector: they depend on its layout only, so that each is counted once."""
    _check_name(name)
    chunks: list[_Chunk] = [_text(name)]
    _extend(chunks, _VECTOR, _layout(layout), _text(DTYPE_NAMES[dtype]), _Numbers(numbers, bytes))
    return sum(map(len, chunks))


def _octets(tensor: Tensor) -> memoryview:
    return array_of(octets_of(tensor)).data


@lru_cache(maxsize=256)
def _layout(layout: Layout) -> bytes:
    return _bytes(_bytes(list(layout.names), [list(shape) for shape in layout.shapes], layout.parameters))


@lru_cache(maxsize=1024)
def _text(text: str) -> bytes:
    return _bytes(text)


def _packed_index(sparse: Sparse, bits: int) -> bytes:
    if bits:
        return pack(array_of(sparse.index), bits)
    mask = np.zeros(sparse.size, bool)
    mask[array_of(sparse.index)] = True
    return pack(mask, 1)


# Reading: each function takes a reader that stands where the value, or what is left of an extension, begins.


def _read(reader: Reader, depth: int) -> Value:
    kind, number = reader.head()
    match kind:
        case "None":
            return None
        case "bool":
            return bool(number)
        case "int":
            return number
        case "float":
            return float(struct.unpack(">d", reader.take(8))[0])
        case "str":
            return reader.text(number)
        case "bytes":
            return bytes(reader.take(number))
        case "list":
            return _read_list(reader, number, depth)
        case "dict":
            return _read_dict(reader, number, depth)
    code = reader.take(1)[0]
    body = reader.body(number)
    if code == _TUPLE:
        value: Value = tuple(_read_list(body, body.number("list"), depth))
    elif code in _EXTENSIONS:
        value = _EXTENSIONS[code](body)
    else:
        raise reader.bad(f"an extension of unknown type {code}")
    body.finish()
    return value


def _read_list(reader: Reader, count: int, depth: int) -> list[Value]:
    if depth > MAX_DEPTH:
        raise reader.bad(_TOO_DEEP)
    return [_read(reader, depth + 1) for _ in range(count)]


def _read_dict(reader: Reader, count: int, depth: int) -> dict[Any, Value]:
    if depth > MAX_DEPTH:
        raise reader.bad(_TOO_DEEP)
    entries: dict[Any, Value] = {}
    for _ in range(count):
        kind, number = reader.head()
        if kind not in ("str", "int"):
            raise reader.bad(f"a key of type {kind}; the keys of a dict are str or int")
        key = reader.text(number) if kind == "str" else number
        if key in entries:
            raise reader.bad(f"{key!r} is twice a key of one dict")
        entries[key] = _read(reader, depth + 1)
    return entries


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
    if math.prod(max(extent, 1) for extent in shape) >= 1 << 59:  # strides in bytes must stay below 2**63
        raise reader.bad(f"a tensor of shape {list(shape)}, which no machine holds")
    return shape


def _read_numbers(reader: Reader, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    octets = bytearray(reader.take(math.prod(shape) * dtype.itemsize))
    flat = torch.frombuffer(octets, dtype=torch.uint8) if octets else torch.empty(0, dtype=torch.uint8)
    if dtype == torch.bool and octets and flat.max() > 1:
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


_EXTENSIONS: dict[int, Callable[[Reader], Value]] = {
    _TENSOR: lambda reader: _read_numbers(reader, _read_dtype(reader), _read_shape(reader)),
    _VECTOR: _read_vector,
    _SPARSE: _read_sparse,
    _PACKED: _read_packed,
    _SEED: lambda reader: Seed(reader.size()),
}
