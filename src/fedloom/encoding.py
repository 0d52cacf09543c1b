"""The bytes of a message.

They are `MHM`, a version byte, and one map in canonical msgpack (`fedloom.wire`). What msgpack lacks is an
extension (`fedloom.extensions`): a short header in msgpack, then the raw little-endian numbers up to its end.

    1  tuple   list of its items
    2  tensor  dtype, shape; numbers
    3  Vector  layout (bin: names, shapes, how many are parameters), dtype; numbers
    4  Sparse  size, dtype and shape of the values; index, numbers
    5  Packed  dtype, bits, shape; bits
    6  Seed    value

A message has one encoding: what `decode` accepts encodes to the very bytes that came, so a hash of them names a value.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch

from fedloom.errors import CodecError
from fedloom.extensions import EXTENSIONS, Chunk, plain, vector_size
from fedloom.message import Value
from fedloom.vector import Layout, Vector
from fedloom.wire import Reader, head, text

MAGIC = b"MHM"
VERSION = 1
MAX_DEPTH = 16  # lists, tuples and dicts inside one another
TOO_DEEP = f"more than {MAX_DEPTH} lists, tuples or dicts inside one another"
TUPLE = 1  # the code of its extension; the others' are in `EXTENSIONS`


def encode(message: Mapping[str, Value]) -> bytes:
    """The bytes of a message. A value that may not cross raises CodecError, which says in which field it stands."""
    return _joined([_start(len(message)), *(chunk for _, chunks in _fields(message) for chunk in chunks)])


class Pieces:
    """The bytes of a message in pieces, of which those of large tensors are the tensors' own memory: no copy is made.

    It is the message as long as nobody writes to its tensors.
    """

    def __init__(self, message: Mapping[str, Value]) -> None:
        chunks = [_start(len(message)), *(chunk for _, chunks in _fields(message) for chunk in chunks)]
        made = (memoryview(chunk if isinstance(chunk, bytes) else chunk.make()) for chunk in chunks)
        self.parts = [part.cast("B") for part in made if part.nbytes]
        self.ends = [*accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self.ends[-1]

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self.parts)

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)

    def read(self, start: int, size: int) -> bytes:
        """So many of the bytes, from a place on; fewer where they end."""
        place, found = bisect_right(self.ends, start), bytearray()
        while place < len(self.parts) and len(found) < size:
            at = start + len(found) - (self.ends[place] - len(self.parts[place]))
            found += self.parts[place][at : at + size - len(found)]
            place += 1
        return bytes(found)


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
        if type(value) is Vector and plain(value.flat):
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


def _check_name(name: object) -> None:
    if type(name) is not str or not name.isidentifier() or name == "envelope":
        raise CodecError(f"a field is called by an identifier other than 'envelope', not by {name!r}")


# Writing: chunks, those of tensors made last, so that counting them costs no copy.


@lru_cache(maxsize=256)
def _start(fields: int) -> bytes:
    return MAGIC + bytes((VERSION,)) + head("dict", fields)


def _fields(message: Mapping[str, Value]) -> Iterator[tuple[str, list[Chunk]]]:
    for name, value in message.items():
        _check_name(name)
        chunks: list[Chunk] = [_name(name)]
        try:
            _write(chunks, value, 1)
        except CodecError as error:
            way = " -> ".join((f"field {name!r}", *reversed(getattr(error, "__notes__", ()))))
            raise CodecError(f"{way}: {error}") from None
        yield name, chunks


@lru_cache(maxsize=1024)
def _name(name: str) -> bytes:
    return text(name)


@lru_cache(maxsize=1024)
def _vector_size(name: str, layout: Layout, dtype: torch.dtype, numbers: int) -> int:
    """Bytes of a field that is a vector: they depend on its layout only, so that each is counted once."""
    _check_name(name)
    size = vector_size(layout, dtype, numbers)
    return len(_name(name)) + len(head("extension", size)) + 1 + size


def _joined(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk if isinstance(chunk, bytes) else chunk.make() for chunk in chunks)


def _bytes(value: Value) -> bytes:
    chunks: list[Chunk] = []
    _write(chunks, value, 0)
    return _joined(chunks)


def _write(out: list[Chunk], value: Any, depth: int) -> None:
    """Append the chunks of a value inside `depth` containers."""
    kind = type(value)
    (_WRITERS.get(kind) or _inherited(kind))(out, value, depth)


def _inherited(kind: type) -> _Write:
    """How a subclass is written. Plain types and containers are exact: a subclass would not come back."""
    for known in EXTENSIONS:
        if issubclass(kind, known):
            return _WRITERS[known]
    raise CodecError(_unsupported(kind))


def _extend(out: list[Chunk], code: int, *body: Chunk) -> None:
    out += head("extension", sum(map(len, body))) + bytes((code,)), *body


def _extension_writer(code: int, body: Callable[[Any], tuple[Chunk, ...]]) -> _Write:
    return lambda out, value, depth: _extend(out, code, *body(value))


def _write_whole(out: list[Chunk], value: int, depth: int) -> None:
    out.append(head(type(value).__name__, value))


def _write_float(out: list[Chunk], value: float, depth: int) -> None:
    out.append(head("float") + struct.pack(">d", value))


def _write_str(out: list[Chunk], value: str, depth: int) -> None:
    out.append(text(value))


def _write_bytes(out: list[Chunk], value: bytes, depth: int) -> None:
    out += head("bytes", len(value)), value


def _write_container(out: list[Chunk], value: list[Any] | tuple[Any, ...] | dict[Any, Any], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise CodecError(TOO_DEEP)
    if isinstance(value, tuple):
        items: list[Chunk] = []
        _write_container(items, list(value), depth)
        _extend(out, TUPLE, *items)
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


def _full_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _unsupported(kind: type) -> str:
    if issubclass(kind, np.ndarray | np.generic):
        return f"{_full_name(kind)} may not cross: call .item() for a number, torch.from_numpy for an array"
    known = "None, bool, int, float, str, bytes, tensor, Vector, tuple, list, dict, Sparse, Packed and Seed themselves"
    return f"{_full_name(kind)} may not cross: a message holds {known}"


# Reading: each function takes a reader that stands behind the head of the value, and the number in it.


def _read_extension(reader: Reader, length: int, depth: int) -> Value:
    code = reader.take(1)[0]
    body = reader.body(length)
    if code == TUPLE:
        value: Value = tuple(_read_list(body, body.number("list"), depth))
    elif code in _EXTENSION_READERS:
        value = _EXTENSION_READERS[code](body)
    else:
        raise reader.bad(f"an extension of unknown type {code}")
    body.finish()
    return value


def _read_float(reader: Reader, number: int, depth: int) -> float:
    return float(struct.unpack(">d", reader.take(8))[0])


def _read_list(reader: Reader, count: int, depth: int) -> list[Value]:
    if depth > MAX_DEPTH:
        raise reader.bad(TOO_DEEP)
    items: list[Value] = []
    for _ in range(count):
        kind, number = reader.head()
        items.append(_READERS[kind](reader, number, depth + 1))
    return items


def _read_dict(reader: Reader, count: int, depth: int) -> dict[Any, Value]:
    if depth > MAX_DEPTH:
        raise reader.bad(TOO_DEEP)
    entries: dict[Any, Value] = {}
    for _ in range(count):
        kind, number = reader.head()
        if kind not in ("str", "int"):
            raise reader.bad(f"a key of type {kind}; the keys of a dict are str or int")
        key = reader.text(number) if kind == "str" else number
        if key in entries:
            raise reader.bad(f"{key!r} is twice a key of one dict")
        kind, number = reader.head()
        entries[key] = _READERS[kind](reader, number, depth + 1)
    return entries


_Write: TypeAlias = Callable[[list[Chunk], Any, int], None]
_Read: TypeAlias = Callable[[Reader, int, int], Value]

_PLAIN: dict[type, tuple[str, _Write, _Read]] = {
    type(None): ("None", lambda out, value, depth: out.append(head("None")), lambda reader, number, depth: None),
    bool: ("bool", _write_whole, lambda reader, number, depth: bool(number)),
    int: ("int", _write_whole, lambda reader, number, depth: number),
    float: ("float", _write_float, _read_float),
    str: ("str", _write_str, lambda reader, number, depth: reader.text(number)),
    bytes: ("bytes", _write_bytes, lambda reader, number, depth: bytes(reader.take(number))),
    list: ("list", _write_container, _read_list),
    dict: ("dict", _write_container, _read_dict),
}
_WRITERS: dict[type, _Write] = {
    **{kind: write for kind, (_, write, _) in _PLAIN.items()},
    tuple: _write_container,
    **{kind: _extension_writer(code, body) for kind, (code, body, _) in EXTENSIONS.items()},
}
_READERS = {name: read for name, _, read in _PLAIN.values()} | {"extension": _read_extension}
_EXTENSION_READERS = {code: read for code, _, read in EXTENSIONS.values()}
