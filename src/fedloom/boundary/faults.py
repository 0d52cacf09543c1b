"""What befalls replies on their way, and the door that notices: `corrupt:0.1+duplicate:0.05`.

Each kind has its share of the replies, and a reply suffers one at most; which depends on the seed, the round, the call
and the client alone.

    lost        never arrives
    late        arrives a round late, and is refused as stale
    duplicate   arrives twice, and counts once
    corrupt     some bits of its frame are others
    truncate    its frame ends early
    oversize    its frame announces far more bytes than a reply has
    nan, inf    one number is not finite
    shape       one field has another shape
    dtype       one field is of another type
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom import encoding, message
from fedloom.boundary import framing
from fedloom.boundary.stage import Stage
from fedloom.engines import forms
from fedloom.engines.perform import decode_reply
from fedloom.errors import CodecError, UsageError, unknown
from fedloom.message import Sparse
from fedloom.parsing import chain
from fedloom.random import numpy_stream, seed_of
from fedloom.vector import Vector

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call, Outcome
    from fedloom.message import Value

log = logging.getLogger("fedloom.boundary")

FRAMED = ("corrupt", "truncate", "oversize")  # they damage the frame, and leave what is in it
INSIDE = ("nan", "inf", "shape", "dtype")  # they damage what is in a frame that is whole
KINDS = ("lost", "late", "duplicate", *FRAMED, *INSIDE)
AWAY, TWICE = ("lost", "late"), "a duplicate"  # what the fault of an outcome says that is not there, or there again
TIMES, ROOM = 64, 2**16  # a frame may announce so many times the middle reply of its call, and so many bytes more


@dataclass(frozen=True)
class Faults(Stage):
    """Damages replies as a run asks for it, and turns away what the server must not take, whoever it comes from."""

    shares: Mapping[str, float]  # kind -> share of the replies that suffer it
    seed: int
    whole: bool = False  # a rule needs all fields of everybody

    setting = "faults"
    kinds = frozenset({"train", "finish"})  # faults happen in rounds only, but attackers may send NaN in both

    @staticmethod
    def of(text: str | None, seed: int, whole: bool = False) -> Faults:
        """From a text; None: nothing happens on the way, and the door is there."""
        shares: dict[str, float] = {}
        for term in chain(text) if text else []:
            kind, values = term.name, term.values
            if kind not in KINDS:
                raise unknown("fault", kind, KINDS)
            if len(values) != 1 or term.options or not isinstance(values[0], int | float) or not 0 <= values[0] <= 1:
                raise UsageError(
                    f"faults={text}: {term.text!r} is not a kind and its share of the replies, as in {kind}:0.1"
                )
            if kind in shares:
                raise UsageError(f"faults={text} gives {kind} twice")
            shares[kind] = float(values[0])
        if sum(shares.values()) > 1 + 1e-9:
            raise UsageError(f"faults={text}: the shares add up to more than 1, and a reply suffers one fault at most")
        return Faults(shares, seed, whole)

    @property
    def inside(self) -> bool:
        """Whether replies are damaged that the frame around them does not show."""
        return any(kind in INSIDE for kind in self.shares)

    def outcomes(self, books: Books, call: Call, outcomes: Sequence[Outcome]) -> list[Outcome]:
        memory = books.memory.setdefault("faults", {"late": [], "forms": {}})
        limit = allowed(outcomes)
        happened: dict[str, list[int]] = {}
        self._stale(books, call, memory, limit)
        arrived: list[Outcome] = []
        for outcome in outcomes:
            kind = None if outcome.fault else self.fate(call, outcome.client)
            damaged = self._damaged(kind, books, call, outcome, memory, limit)
            if damaged is None:
                arrived.append(outcome)
                continue
            happened.setdefault(str(kind), []).append(outcome.client)
            arrived += damaged
        for kind in self.shares:
            _count(books, call, kind, happened.get(kind, []))
        judged = self._judged(books, call, arrived, memory["forms"])
        came = [o for o in judged if o.fault not in (*AWAY, TWICE)]
        for outcome in came:
            books.judged[outcome.client] = 0.0 if outcome.fault else books.judged.get(outcome.client, 1.0)
            books.asked_in[outcome.client] = call.round
        turned = {o.client: o.fault for o in judged if o.fault and o.fault not in AWAY}
        _count(books, call, "refused", list(turned), turned)
        return judged

    def fate(self, call: Call, client: int) -> str | None:
        """What befalls a client's reply to a call."""
        if not self.shares or call.kind != "train":
            return None
        drawn = seed_of(self.seed, "world", "faults", call.round, call.nth, client) / 2**63
        for kind, share in self.shares.items():
            if drawn < share:
                return kind
            drawn -= share
        return None

    def _damaged(
        self,
        kind: str | None,
        books: Books,
        call: Call,
        outcome: Outcome,
        memory: Mapping[str, Any],
        limit: int,
    ) -> list[Outcome] | None:
        """What arrives in place of a reply; None if it is the reply itself."""
        if kind is None:
            return None
        if kind == "lost":
            return [replace(outcome, fault="lost")]
        if kind == "duplicate":
            return [outcome, replace(outcome, logs={}, steps=0, state=None, labels=0)]
        if kind in INSIDE:
            reply = spoilt(outcome.reply, kind)
            return None if reply is None else [replace(outcome, reply=reply)]
        sealed = framing.pack_frame(encoding.encode(outcome.reply), outcome.client, call.round, call.nth)
        if kind == "late":
            memory["late"].append({"function": call.function, "frame": sealed})
            return [replace(outcome, fault="late")]
        draw = numpy_stream(self.seed, "world", "mangled", call.round, call.nth, outcome.client)
        try:
            whole = framing.unpack_frame(mangled(sealed, kind, draw), limit)
            reply = message.moved(encoding.decode(whole.payload), books.site.device)
        except CodecError as error:
            return [replace(outcome, fault=str(error))]
        return [replace(outcome, reply=reply)]

    def _stale(self, books: Books, call: Call, memory: dict[str, Any], limit: int) -> None:
        """Refuses the frames that were late in an earlier round: they answer another call."""
        due: list[Any] = []
        kept: list[Any] = []
        for late in memory["late"]:
            there = framing.unpack_frame(late["frame"])
            (due if there.round < call.round and late["function"] == call.function else kept).append(late)
        memory["late"] = kept
        clients = [framing.unpack_frame(late["frame"]).client for late in due]
        if "late" in self.shares:
            _count(books, call, "stale", clients)

    def _judged(self, books: Books, call: Call, outcomes: Sequence[Outcome], before: dict[str, Any]) -> list[Outcome]:
        """The outcomes with the fault of those that the server turns away."""
        once: list[Outcome] = []
        seen: set[int] = set()
        for outcome in outcomes:
            if not outcome.fault and outcome.client in seen:
                outcome = replace(outcome, fault=TWICE)
            elif not outcome.fault and outcome.client not in call.clients:
                outcome = replace(outcome, fault="nobody asked this client")
            once.append(outcome)
            seen.add(outcome.client)
        replies: dict[int, Mapping[str, Value]] = {}
        refused: dict[int, str] = {}
        for o in once:
            if not o.fault:
                try:
                    replies[o.client] = decode_reply(books.site, call, o)  # forms are compared without compression
                except CodecError as error:
                    refused[o.client] = str(error)
        for part in call.parts.values():  # what groups learn may differ
            members = set(part.clients)
            its = {client: reply for client, reply in replies.items() if client in members}
            refused |= forms.find_malformed(part, its, self.whole, before.setdefault(part.place, {}))
        return [o if o.fault or o.client not in refused else replace(o, fault=refused[o.client]) for o in once]


def allowed(outcomes: Sequence[Outcome]) -> int:
    """The most bytes that a frame of a call may announce."""
    sizes = [sum(outcome.sizes.values()) for outcome in outcomes]
    return min(framing.LIMIT, TIMES * median_low(sizes) + ROOM) if sizes else ROOM


def mangled(sealed: bytes, kind: str, draw: Any) -> bytes:
    """A frame that was damaged on its way."""
    if kind == "truncate":
        return sealed[: int(draw.integers(len(sealed)))]
    octets = bytearray(sealed)
    if kind == "oversize":
        octets[4:12] = (2**40).to_bytes(8, "little")
        return bytes(octets)
    for place in set(draw.integers(8 * len(octets), size=1 + int(draw.integers(8))).tolist()):
        octets[place // 8] ^= 1 << place % 8
    return bytes(octets)


def spoilt(reply: Mapping[str, Value], kind: str) -> dict[str, Value] | None:
    """A reply whose first field of numbers is damaged; None if it has none."""
    done = False

    def spoil(value: Any) -> Any:
        nonlocal done
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(spoil(inner) for inner in value)
        numbers = value.flat if isinstance(value, Vector) else value.values if isinstance(value, Sparse) else value
        if done or not isinstance(numbers, Tensor) or not numbers.is_floating_point() or not numbers.numel():
            return value
        done = True
        if kind == "shape":
            return torch.cat([numbers.flatten(), numbers.flatten()[:1]])[None]
        if kind == "dtype":
            numbers = numbers.to(torch.float32 if numbers.dtype == torch.float64 else torch.float64)
        else:
            numbers = numbers.clone()
            numbers.view(-1)[0] = float(kind)
        if isinstance(value, Vector):
            return Vector(numbers, value.layout)
        return Sparse(value.index, numbers, value.size) if isinstance(value, Sparse) else numbers

    spoilt = {name: spoil(value) for name, value in reply.items()}
    return spoilt if done else None


def _count(
    books: Books, call: Call, kind: str, clients: Sequence[int], why: Mapping[int, str | None] | None = None
) -> None:
    """Takes it into the round's record, and into the log once a round."""
    name = f"fault/{kind}"
    if clients and not books.notes.get(name):
        reasons = ": " + "; ".join(sorted({str(reason) for reason in why.values()})) if why else ""
        log.info(
            "round %d, %s: %s, %d replies (of client %d first)%s",
            call.round, call.function, kind, len(clients), clients[0], reasons,
        )  # fmt: skip
    books.notes[name] = books.notes.get(name, 0) + len(clients)
