"""What the parties of one secure sum agree on beforehand, and what they say to each other: all of it public."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedloom import encoding
from fedloom.boundary.secure.field import FixedPoint, Lanes
from fedloom.boundary.secure.outline import Outline
from fedloom.errors import CodecError, NobodyReplied, RunError
from fedloom.mean import Sum

PHASES = ("advertise", "share", "masked", "check", "unmask")  # in each, clients speak and then the server


class Abandoned(NobodyReplied):
    """A secure sum that cannot be had: too few clients were left. What they sent stays hidden."""


class Passed(NamedTuple):
    """One message of the protocol, as an onlooker sees it."""

    phase: str
    direction: str  # up, from the client, or down
    client: int
    bytes: int


@dataclass(frozen=True)
class Terms:
    """Of one sum: its name (16 bytes that no other sum has), how many must stay, and how numbers are written."""

    session: bytes
    quorum: int
    fixed: FixedPoint
    clips: bool = False  # whether a number out of range is moved to its edge, rather than refused
    signed: bool = False  # whether clients sign their keys and check that all were told the same

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of this sum: `check` only where clients sign."""
        return tuple(phase for phase in PHASES if self.signed or phase != "check")

    def lanes(self, outline: Outline, reply: Sum, client: int) -> Lanes:
        """The weights and the weighted numbers of a client's reply as whole numbers; checks their range."""
        fixed, edge = self.fixed, self.fixed.clip * reply.weight
        if not 0 <= reply.weight <= fixed.weight:
            raise RunError(
                f"client {client} has the weight {reply.weight:g}, a secure sum here takes weights up to "
                f"{fixed.weight:g}: set a larger one, as in secure: bonawitz:weight={reply.weight:g}"
            )
        weights, numbers = outline.flat(reply)
        outside = ~(np.abs(numbers) <= edge)
        if outside.any():
            place = int(outside.argmax())
            if not self.clips or np.isnan(numbers[outside]).any():
                raise RunError(
                    f"the field {outline.field_of(place)} of client {client} holds "
                    f"{numbers[place] / reply.weight if reply.weight else numbers[place]:g}, outside the range "
                    f"±{fixed.clip:g} of a secure sum: set a larger clip=, or outside=clip to cut numbers off there"
                )
            numbers = numbers.clip(-edge, edge)
        return np.concatenate([fixed.encoded(weights, fixed.weight_scale), fixed.encoded(numbers, fixed.scale)])

    def total(self, outline: Outline, lanes: Lanes, count: int, device: Any = "cpu") -> Sum:
        """The sum of `count` replies that the sum of their lanes stands for."""
        fixed, at = self.fixed, outline.weights
        weights = fixed.decoded(lanes[:at], fixed.weight_scale)
        return outline.filled(weights, fixed.decoded(lanes[at:], fixed.scale), count, device)

    def shared(self, outline: Outline, present: Iterable[Outline | None]) -> None:
        """Raises Abandoned if of those present one alone is known to have something that is summed.

        It can be only where some came without an outline: they count as present, and may not have it.
        """
        having = Counter(path for known in present if known is not None for path in known.leaves)
        for path in outline.leaves:
            if having[path] < 2:
                raise Abandoned(
                    f"secure aggregation was given up at 'masked': the field {'.'.join(map(str, path))!r} may be that "
                    "of one client alone; nothing was revealed"
                )

    def enough(self, phase: str, there: int, asked: int) -> None:
        """Raises Abandoned if fewer clients than the quorum are there."""
        if there < self.quorum:
            raise Abandoned(
                f"secure aggregation was given up at {phase!r}: {there} of {asked} clients were left, "
                f"{self.quorum} are needed; nothing was revealed"
            )


def written(**fields: Any) -> bytes:
    """The bytes of a protocol message."""
    return encoding.encode(fields)


def read(data: bytes, who: str, **kinds: type) -> list[Any]:
    """The fields of a protocol message, of these types; raises RunError for anything else."""
    try:
        fields = encoding.decode(data)
    except CodecError as error:
        raise RunError(f"secure aggregation: {who} sent no message: {error}") from error
    if fields.keys() != kinds.keys() or any(type(fields[name]) is not kind for name, kind in kinds.items()):
        raise RunError(f"secure aggregation: {who} sent the fields {sorted(fields)}, expected {sorted(kinds)}")
    return [fields[name] for name in kinds]


def has_of(outline: Outline | None) -> bytes:
    """What a client says that its reply has; None where it has none yet."""
    return written(outline=outline.packed() if outline is not None else {})


def keys_of(session: bytes, client: int, letter: bytes, mask: bytes, has: bytes) -> bytes:
    """What a client signs when it advertises its keys."""
    return written(what="keys", session=session, client=client, letter=letter, mask=mask, has=has)


def arrived_of(session: bytes, arrived: list[int], outline: Outline) -> bytes:
    """What a client signs when it has heard whose replies arrived: these, and what it took to be summed."""
    return written(what="arrived", session=session, arrived=arrived, outline=outline.packed())


def table(value: dict[Any, Any], who: str, size: int | None = None) -> dict[int, bytes]:
    """A dict from client to bytes (of one size, if given); raises RunError for anything else."""
    for client, item in value.items():
        if type(client) is not int or client < 0 or type(item) is not bytes or size not in (None, len(item)):
            raise RunError(
                f"secure aggregation: {who} sent something for client {client!r} that is not what it should be"
            )
    return value
