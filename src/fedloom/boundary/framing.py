"""Sealed frames: a message with its length, whose it is, and a digest, so that what was damaged on the way is noticed.

    MHF, version   4 bytes
    length         8 bytes, of the payload
    client         8 bytes
    round, nth     4 bytes each: the call that it answers
    digest         16 bytes, BLAKE2b of all of the above and the payload
    payload        an encoded message

The digest finds accidents. It is no signature: whoever means harm computes it as well as anybody.
"""

from __future__ import annotations

import hashlib
from struct import Struct
from typing import NamedTuple

from fedloom.errors import CodecError

MAGIC = b"MHF\x01"
FRONT = Struct("<4sQqII")  # what stands before the digest
DIGEST = 16
HEAD = FRONT.size + DIGEST  # bytes before the payload
LIMIT = 2**31


class Frame(NamedTuple):
    """What a frame says of itself, and its payload."""

    client: int
    round: int
    nth: int
    payload: memoryview


def pack_frame(payload: bytes, client: int, round: int, nth: int) -> bytes:
    """The frame of a payload: the answer of a client to the `nth` call of a round."""
    front = FRONT.pack(MAGIC, len(payload), client, round, nth)
    return b"".join((front, _digest(front, payload), payload))


def frame_length(head: bytes | memoryview, limit: int = LIMIT) -> int:
    """The length of the payload that a frame's first `HEAD` bytes announce.

    A reader asks this before it makes room for the payload. Raises CodecError for what is no head, or over `limit`.
    """
    if len(head) < HEAD:
        raise CodecError(f"a frame of {len(head)} bytes is cut short: its head alone has {HEAD}")
    magic, length, *_ = FRONT.unpack_from(head)
    if magic != MAGIC:
        raise CodecError(f"not a frame: it begins with {magic!r}, expected {MAGIC!r}")
    if length > limit:
        raise CodecError(f"a frame announces {length} bytes, over the limit of {limit}")
    return int(length)


def unpack_frame(data: bytes | memoryview, limit: int = LIMIT) -> Frame:
    """The frame in these bytes, its payload not copied; raises CodecError unless it is whole and undamaged."""
    view = memoryview(data).cast("B")
    length = frame_length(view[:HEAD], limit)
    if len(view) != HEAD + length:
        what = "is cut short" if len(view) < HEAD + length else "goes on too long"
        raise CodecError(f"a frame {what}: it announces {length} bytes and brings {len(view) - HEAD}")
    payload = view[HEAD:]
    if _digest(view[: FRONT.size], payload) != view[FRONT.size : HEAD]:
        raise CodecError("a frame was damaged on its way: its digest does not fit")
    _, _, client, round, nth = FRONT.unpack_from(view)
    return Frame(client, round, nth, payload)


def _digest(front: bytes | memoryview, payload: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(front, digest_size=DIGEST)
    digest.update(payload)
    return digest.digest()
