"""Canonical msgpack, and whole numbers of a few bits: what `fedloom.encoding` writes with and reads with.

The subset of https://github.com/msgpack/msgpack/blob/master/spec.md in which everything has exactly one encoding: a
number or a length takes its shortest form, a float is a double, an extension has an explicit length (no fixext). One
form is ours: msgpack counts to 2**32 - 1, and a longer extension has 0xC1, which msgpack never uses, and 64 bits.
msgpack's own reader takes every form and forgets which it was, and before 1.2 it allocated an array from the length
that the bytes claim; here nothing is allocated before the bytes that fill it are seen to be there.
"""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from fedloom.errors import CodecError

Array = np.ndarray[Any, np.dtype[Any]]
PIECE = 1 << 20  # bytes of a mapped file that are in memory at once while they are copied


class _Form(NamedTuple):
    """A tag and the number that follows it; without a struct the number is in the tag itself, added to it."""

    kind: str
    tag: int
    struct: Struct | None
    least: int
    most: int


def _forms(kind: str, tag: int, formats: str, least: int, most: int = (1 << 32) - 1) -> list[_Form]:
    """A run of tags, each for the numbers from `least` to `most` that the formats before it cannot hold."""
    forms = []
    for place, letter in enumerate(formats):
        number = Struct(f">B{letter}")
        bits = 8 * (number.size - 1) - letter.islower()  # a lower-case letter is signed and here for negative numbers
        if letter.islower():
            forms.append(_Form(kind, tag + place, number, -1 << bits, most))
            most = (-1 << bits) - 1
        else:
            forms.append(_Form(kind, tag + place, number, least, (1 << bits) - 1))
            least = 1 << bits
    return forms


_FORMS = [
    _Form("None", 0xC0, None, 0, 0),
    _Form("bool", 0xC2, None, 0, 1),
    _Form("float", 0xCB, None, 0, 0),  # its 8 bytes follow
    _Form("int", 0x00, None, 0, 127),
    _Form("int", 0x100, None, -32, -1),
    *_forms("int", 0xCC, "BHIQ", least=128),
    *_forms("int", 0xD0, "bhiq", least=0, most=-33),
    # the number of these is a length
    _Form("str", 0xA0, None, 0, 31),
    *_forms("str", 0xD9, "BHI", least=32),
    *_forms("bytes", 0xC4, "BHI", least=0),
    _Form("list", 0x90, None, 0, 15),
    *_forms("list", 0xDC, "HI", least=16),
    _Form("dict", 0x80, None, 0, 15),
    *_forms("dict", 0xDE, "HI", least=16),
    *_forms("extension", 0xC7, "BHI", least=0),
    _Form("extension", 0xC1, Struct(">BQ"), 1 << 32, (1 << 64) - 1),
]
_FORMS_OF = {kind: [form for form in _FORMS if form.kind == kind] for kind in {form.kind for form in _FORMS}}
_FORM_AT = {form.tag: form for form in _FORMS if form.struct} | {
    form.tag + number: form._replace(least=number)
    for form in _FORMS
    if not form.struct
    for number in range(form.least, form.most + 1)
}
_PARTS = frozenset(("list", "dict", "extension"))  # an empty one is a byte on the wire and 70 to 700 in memory
_BYTES_A_UNIT = {"str": 1, "bytes": 1, "list": 1, "dict": 2, "extension": 1}  # at least so many, for a length


@lru_cache(maxsize=1 << 14)
def head(kind: str, number: int = 0) -> bytes:
    """The bytes before a value: its kind, and of an int or a bool itself, of what has a length the length."""
    for _, tag, struct, least, most in _FORMS_OF[kind]:
        if least <= number <= most:
            return struct.pack(tag, number) if struct else bytes((tag + number,))
    if kind == "int":
        raise CodecError("an int from -2**63 to 2**64 - 1 is expected, this one is outside")
    bits = _FORMS_OF[kind][-1].most.bit_length()
    raise CodecError(f"a value of {number} bytes or items is too large for a message; the limit is 2**{bits} - 1")


def text(value: str) -> bytes:
    """The bytes of a str, with those before it."""
    try:
        octets = value.encode()
    except UnicodeEncodeError:
        raise CodecError("a str with half a surrogate pair has no UTF-8") from None
    return head("str", len(octets)) + octets


@dataclass(slots=True)
class Reader:
    """The bytes of a message from `at` to `end`. Every failure is a CodecError that names the byte.

    `expanded` (bytes) is the limit for a tensor that may be larger in memory than on the wire, and `parts` counts
    down the lists, dicts and extensions that may still come.
    """

    data: memoryview
    at: int
    end: int
    expanded: int
    parts: Iterator[int]

    def bad(self, reason: str) -> CodecError:
        """The error to raise here."""
        return CodecError(f"byte {self.at}: {reason}")

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > self.end - self.at:
            raise self.bad(f"{count} bytes are announced, {self.end - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def copy(self, count: int) -> bytearray | Array:
        """The next `count` bytes in memory of their own, into which one may write."""
        source = self.take(count)
        if count <= PIECE:
            return bytearray(source)
        made = np.empty(count, np.uint8)
        for at in range(0, count, PIECE):
            piece = source[at : at + PIECE]
            made[at : at + PIECE] = piece
            _let_go(piece)
        return made

    def body(self, length: int) -> "Reader":
        """A reader of the next `length` bytes, which this one skips."""
        self.take(length)
        return Reader(self.data, self.at - length, self.at, self.expanded, self.parts)

    def finish(self) -> None:
        """Raise unless everything has been read."""
        if self.at < self.end:
            raise self.bad(f"{self.end - self.at} bytes too many")

    def head(self) -> tuple[str, int]:
        """The kind and the number that `head` wrote; a length fits into the bytes that are left."""
        start = self.at
        tag = self.take(1)[0]
        form = _FORM_AT.get(tag)
        if form is None:
            raise self.bad(f"0x{tag:02x} begins no value of a message")
        kind, _, struct, number, most = form
        if struct:
            least, self.at = number, start
            number = struct.unpack(self.take(struct.size))[1]
            if not least <= number <= most:
                raise self.bad(f"{kind} {number} is not in its shortest form")
        if kind in _BYTES_A_UNIT and number * _BYTES_A_UNIT[kind] > self.end - self.at:
            what = "an extension" if kind == "extension" else f"a {kind}"
            raise self.bad(f"{what} of length {number} is announced, {self.end - self.at} bytes are left")
        if kind in _PARTS and next(self.parts, None) is None:
            raise self.bad("more lists, tuples, dicts and tensors than a message may have")
        return kind, number

    def number(self, wanted: str) -> int:
        """The number of a head of the kind `wanted`."""
        kind, number = self.head()
        if kind != wanted:
            raise self.bad(f"{kind} where {wanted} is expected")
        return number

    def size(self) -> int:
        """An int of 63 bits from 0."""
        size = self.number("int")
        if not 0 <= size < 1 << 63:
            raise self.bad(f"{size} where a size from 0 to 2**63 - 1 is expected")
        return size

    def text(self, length: int) -> str:
        """A str of `length` bytes."""
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise self.bad("a str is not UTF-8") from None

    def integers(self, count: int, bits: int) -> Array:
        """The inverse of `pack`: unsigned integers [count]."""
        octets = np.frombuffer(self.take(packed_size(count, bits)), np.uint8)
        padding = -count * bits % 8
        if padding and octets[-1] >> (8 - padding):
            raise self.bad("the bits after the last number are not zero")
        width = _width(bits)
        if bits == 8 * width:
            return octets.view(f"<u{width}")
        single = np.unpackbits(octets, count=count * bits, bitorder="little")
        if bits == 1:
            return single
        wide = np.zeros((count, width), np.uint8)
        wide[:, : math.ceil(bits / 8)] = np.packbits(single.reshape(count, bits), axis=1, bitorder="little")
        return wide.view(f"<u{width}").reshape(-1)


def _let_go(piece: memoryview) -> None:
    """Bytes that are part of a mapped file need not stay in memory: whoever looks again has them from the disk."""
    if piece.readonly and isinstance(piece.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        begin, at = (np.frombuffer(one, np.uint8).ctypes.data for one in (piece.obj, piece))
        first = (at - begin) // mmap.PAGESIZE * mmap.PAGESIZE  # with the rest of the page before
        piece.obj.madvise(mmap.MADV_DONTNEED, first, at - begin + len(piece) - first)


def pack(numbers: Array, bits: int) -> bytes:
    """Whole numbers below 2**bits (bits from 1 to 64), one after another from the lowest bit of the first byte."""
    width = _width(bits)
    octets = numbers.reshape(-1).astype(f"<u{width}").view(np.uint8)
    if bits == 8 * width:
        return octets.tobytes()
    if bits > 1:
        octets = np.unpackbits(octets.reshape(-1, width), axis=1, bitorder="little")[:, :bits]
    return np.packbits(octets, bitorder="little").tobytes()


def packed_size(count: int, bits: int) -> int:
    """Bytes that `pack` makes of so many numbers."""
    return (count * bits + 7) // 8


def _width(bits: int) -> int:
    """Bytes of the smallest unsigned integer of so many bits."""
    return next(width for width in (1, 2, 4, 8) if bits <= 8 * width)
