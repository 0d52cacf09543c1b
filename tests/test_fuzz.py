"""Ten thousand damaged messages: no crash, no hang, no large allocation, none accepted that is not what was sent."""

import struct
import tracemalloc

import pytest
import torch

from fedloom import encoding
from fedloom.boundary import framing
from fedloom.errors import CodecError
from fedloom.message import Packed, Seed, Sparse
from fedloom.random import numpy_stream
from fedloom.vector import Layout, Vector
from fedloom.wire import head

LAYOUT = Layout(("body.weight", "body.bias", "running"), ((4, 3), (4,), (2,)), 2)
MESSAGES = [
    {},
    {"n": 3, "rate": 0.5, "name": "grüß", "raw": b"\x00\xff" * 9, "nothing": None, "yes": True, "far": -(2**60)},
    {"delta": Vector(torch.arange(18.0), LAYOUT), "n": 12},
    {"few": Sparse(torch.tensor([1, 5, 900]), torch.ones(3, 2), 1000), "seed": Seed(2**62)},
    {"mask": Packed(torch.arange(40) % 3 == 0, 1), "codes": Packed(torch.arange(30) % 8, 3)},
    {"protos": {c: torch.full((5,), float(c)) for c in range(4)}, "nested": [1, (2.0, {"a": [None]})]},
    {
        "half": torch.ones(3, 2, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "z": torch.ones(2, dtype=torch.complex64),
    },
]
ENCODED = [encoding.encode(sent) for sent in MESSAGES]
SEALED = [framing.pack_frame(data, k, 3, 1) for k, data in enumerate(ENCODED)]
TRIALS = 10_000
ROOM = 2**20  # bytes that a decoder may hold at once for messages of some hundred


def flipped(data, rng):
    """Some bits are others."""
    octets = bytearray(data)
    for _ in range(1 + int(rng.integers(8))):
        octets[int(rng.integers(len(octets)))] ^= 1 << int(rng.integers(8))
    return bytes(octets)


def cut(data, rng):
    """It ends early, or lacks a piece."""
    start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return data[:start] if rng.integers(2) else data[:start] + data[stop:]


def spliced(data, rng):
    """A piece of another message, or of random bytes, stands in it."""
    other = ENCODED[int(rng.integers(len(ENCODED)))] if rng.integers(2) else rng.bytes(int(rng.integers(1, 40)))
    start, stop = sorted(rng.integers(0, len(other) + 1, 2).tolist())
    place = int(rng.integers(len(data) + 1))
    return data[:place] + other[start:stop] + data[place + int(rng.integers(0, 20)) :]


def claimed(data, rng):
    """A length or a number in it claims to be another, often a huge one."""
    kind = ("str", "bytes", "list", "dict", "extension", "int")[int(rng.integers(6))]
    number = int(rng.integers(2**32)) if rng.integers(2) else int(rng.integers(300))
    place = int(rng.integers(min(4, len(data)), len(data) + 1))
    return data[:place] + head(kind, number) + data[place + int(rng.integers(0, 6)) :]


def headed(data, rng):
    """A random head before the rest, or random bytes altogether."""
    if rng.integers(2):
        return b"MHM\x01" + rng.bytes(int(rng.integers(0, 60)))
    return rng.bytes(int(rng.integers(1, 60))) + data[int(rng.integers(len(data))) :]


WAYS = (flipped, cut, spliced, claimed, headed)


def damaged(sources):
    """TRIALS damaged byte strings, each with the one it was made of."""
    rng = numpy_stream(0, "fuzz", "messages")
    for trial in range(TRIALS):
        data = sources[int(rng.integers(len(sources)))]
        for _ in range(1 + int(rng.integers(2))):
            data = WAYS[(trial + int(rng.integers(2))) % len(WAYS)](data, rng) or b"\x00"
        yield data


def peak(check):
    """The most that Python and numpy held at once while it ran, in bytes."""
    tracemalloc.start()
    try:
        check()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_damaged_messages_are_refused_or_are_other_whole_messages():
    accepted = 0
    for data in damaged(ENCODED):
        try:
            got = encoding.decode(data, expanded=2**16)
        except CodecError:
            continue
        accepted += 1
        assert encoding.encode(got) == data, "what is accepted is exactly what the bytes say"
    assert accepted < TRIALS / 2, "most damage shows already without a digest"


def test_no_damaged_frame_is_accepted():
    whole = set(SEALED)
    refused = 0
    for data in damaged(SEALED):
        if data in whole:
            continue  # nothing was damaged after all
        with pytest.raises(CodecError):
            framing.unpack_frame(data)
        refused += 1
    assert refused > 0.9 * TRIALS


def test_damage_allocates_little():
    def check():
        for data in list(damaged(ENCODED))[::5]:
            try:
                encoding.decode(data, expanded=2**16)
            except CodecError:
                continue

    assert peak(check) < ROOM + 400 * TRIALS / 5


@pytest.mark.parametrize("kind", ["str", "bytes", "list", "dict", "extension"])
def test_a_length_that_is_not_there_costs_nothing(kind):
    data = b"MHM\x01" + head("dict", 1) + head("str", 1) + b"x" + head(kind, 2**32 - 1) + b"\x01\x02\x03"

    def check():
        with pytest.raises(CodecError):
            encoding.decode(data)

    assert peak(check) < ROOM


def test_a_shape_that_is_not_there_costs_nothing():
    for shape in ([2**40], [2**20, 2**20], [2**31] * 8):
        body = b"".join([head("str", 7), b"float32", head("list", len(shape)), *(head("int", n) for n in shape)])
        data = b"MHM\x01" + head("dict", 1) + head("str", 1) + b"x" + head("extension", len(body)) + b"\x02" + body

        def check(data=data):
            with pytest.raises(CodecError):
                encoding.decode(data)

        assert peak(check) < ROOM


def test_a_frame_that_announces_much_costs_nothing():
    for length in (2**31 + 1, 2**40, 2**64 - 1):
        octets = bytearray(SEALED[0])
        octets[4:12] = struct.pack("<Q", length)

        def check(octets=octets):
            with pytest.raises(CodecError, match="over the limit"):
                framing.unpack_frame(octets)

        assert peak(check) < ROOM


def test_whole_messages_pass():
    for data, sealed in zip(ENCODED, SEALED, strict=True):
        assert encoding.encode(encoding.decode(framing.unpack_frame(sealed).payload)) == data
    assert len(set(SEALED)) == len(MESSAGES)
    assert {len(s) - len(d) for s, d in zip(SEALED, ENCODED, strict=True)} == {framing.HEAD}
