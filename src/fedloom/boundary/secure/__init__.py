"""Secure aggregation: the server learns the sum of the replies that `mean` averages, and of no reply more than that.

    --secure bonawitz                            masks that cancel; any third of the cohort may be lost, at any time
    --secure bonawitz:threshold=0.6,bits=32,clip=8,weight=1
    --secure ckks                                homomorphic encryption with a key holder (extra `he`)

Against whom: a server, and clients that conspire with it (fewer than the quorum), who follow the protocol and are
curious. With `signed=true` bonawitz also holds off a server that lies about who is there or what is summed, or invents
clients, if fewer than a third conspire: clients sign, by keys from a registry that the server cannot write to, and over
two thirds must stay. What the server learns besides the sum: who was there in which phase, and the outline of each
reply (names, shapes, which keys of a dict it has; not the places of a Sparse). A field or key that fewer clients than
the quorum have is withheld, for its sum would be theirs (`secure_withheld` counts them); of a coordinate of a Sparse
that one client alone sends the sum is that client's number, though not whose it is. All this holds for what `mean` sums
in training rounds. A method that asks there for single replies is refused, unless `calls=allow` says that they are no
secret.

Numbers travel in fixed point (`FixedPoint`). A number outside ±clip is refused, by the name of its field, because
cutting it off would change the algorithm without a word; `outside=clip` says the word. `weight` bounds a reply's
weight; by default it is the largest number of samples that a client of the cohort registered, and 1 for a plain mean.

Parties are `client.SecureClient` and `server.SecureServer`, whose methods are the protocol's messages in bytes: a
network carries them as they are. `aggregate` lets simulated parties play a round.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedloom.boundary.secure.field import FixedPoint
from fedloom.boundary.secure.outline import Outline
from fedloom.boundary.secure.shamir import Entropy
from fedloom.boundary.secure.terms import PHASES, Abandoned, Passed, Terms
from fedloom.boundary.stage import Combined, Gathered, Stage
from fedloom.calls import SILENT, SUMMED
from fedloom.errors import RunError, UsageError, unknown
from fedloom.mean import Sum
from fedloom.parsing import Term, bound
from fedloom.random import numpy_stream

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call
    from fedloom.method import Planned

PROTOCOLS = {"bonawitz": ("cryptography", "secure"), "ckks": ("tenseal", "he")}  # what each needs, and the extra
BITS = {"bonawitz": 48, "ckks": 36}
SERVER = -1  # whose entropy names the session


@dataclass(frozen=True)
class Secure(Stage):
    """How the sums of a run are taken."""

    protocol: str = "bonawitz"
    threshold: float = 2 / 3  # of the clients asked, so large a share must stay to the end, or the sum is given up
    bits: int = 0  # of a number under its mask; 0: 48 for bonawitz, 36 for ckks
    clip: float = 1024.0  # numbers lie within ±clip
    weight: float | None = None  # weights lie within 0 and this; None: see the head of this page
    outside: Literal["refuse", "clip"] = "refuse"
    calls: Literal["refuse", "allow"] = "refuse"
    signed: bool = False  # against servers that lie

    setting = "secure"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise unknown("secure protocol", self.protocol, PROTOCOLS)
        object.__setattr__(self, "bits", self.bits or BITS[self.protocol])
        if not 0.5 < self.threshold <= 1:
            raise UsageError(
                f"secure: threshold={self.threshold:g}; it lies over 0.5, so that no two groups of clients could be "
                "asked for different secrets, and is at most 1"
            )
        if self.protocol == "bonawitz" and self.bits not in range(16, 65, 8):
            raise UsageError(f"secure: bits={self.bits}; bonawitz takes 16, 24, 32, 40, 48, 56 or 64 bits a number")
        if self.protocol == "ckks" and not 16 <= self.bits <= 36:
            raise UsageError(f"secure: bits={self.bits}; ckks is exact for 16 to 36 bits a number")
        if self.signed and self.protocol != "bonawitz":
            raise UsageError(
                f"secure: signed=true; only bonawitz is held against servers that lie, not {self.protocol}"
            )
        for name in ("clip", "weight"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"secure: {name}={value}; it is a number over 0")

    @staticmethod
    def parse(text: str) -> Secure:
        """The protocol and its options, as in `bonawitz:threshold=0.6,clip=8`; sees that its extra is installed."""
        term = Term(text)
        if term.values:
            first = next(field.name for field in fields(Secure) if field.name != "protocol")
            raise UsageError(f"secure: {text!r}: write {term.name}:{first}={term.values[0]}")
        made = Secure(term.name, **bound(term, Secure, f"secure: {term.name}", besides=("protocol",)))
        package, extra = PROTOCOLS[made.protocol]
        if find_spec(package) is None:
            raise UsageError(f"secure: {made.protocol} needs the extra: pip install 'fedloom[{extra}]'")
        return made

    def quorum(self, clients: int) -> int:
        """How many of so many clients must stay: the threshold's share, over half (signed: two thirds), two."""
        most = 2 * clients // 3 if self.signed else clients // 2
        return max(2, most + 1, math.ceil(self.threshold * clients - 1e-9))

    def terms(self, session: bytes, clients: int, weight: float = 1.0) -> Terms:
        """What the parties of a sum over so many clients agree on; `weight` bounds a client's, if no option does."""
        if clients < 2:
            raise RunError("a secure sum needs two clients: that of one is its own reply")
        fixed = FixedPoint(self.bits, clients, self.clip, self.weight or weight)
        return Terms(session, self.quorum(clients), fixed, self.outside == "clip", self.signed)

    def check_call(self, call: Call | Planned) -> None:
        # The server would see single replies.
        replied = call.verb not in (*SUMMED, "exchange", *SILENT)
        if call.kind == "train" and replied and self.calls == "refuse":
            raise UsageError(
                f"secure={self.protocol}: only what a method sums by mean is secure, and this one asks for each reply "
                f"of {call.function} by {call.verb}; if those are no secret, {self.protocol}:calls=allow lets it"
            )

    def books_replies(self, call: Call) -> bool:
        return call.verb in SUMMED

    def combine(self, books: Books, call: Call, replies: Gathered, inner: Callable[[], Combined]) -> Combined:
        """The sum of the replies to a call; its bytes are booked as `secure.share` etc.

        A client without a reply never advertises keys; one whose reply is lost is lost when it should mask it. Notes
        `secure_error`, the bound on what fixed point takes the mean of whole replies off. Raises Abandoned if too few
        are left. A group of one has no sum but its member's reply: it is not asked for it, and counts as withheld.
        """
        if call.group is not None and len(call.clients) < 2:
            books.notes["secure_withheld"] = 1 + books.notes.get("secure_withheld", 0)
            raise Abandoned(f"the sum of group {call.group!r} would be the reply of its only client")
        transcript = list[Passed]()
        parts, weight = replies.parts, 1.0
        lost = {"advertise": {*call.clients} - replies.worked, "masked": {*call.clients} - parts.keys()}
        if replies.weighted:
            weight = max(1.0, *(float(books.info(client).get("n", 1)) for client in call.clients))
        entropy = keyed(books.site.seed, *call.key)
        try:
            total = aggregate(
                parts,
                call.clients,
                lost,
                self,
                weight=weight,
                entropy=entropy,
                transcript=transcript,
                device=books.site.device,
            )
        finally:
            for phase, direction, client, size in transcript:
                books.ledger.charge(books.round, call, direction, [client], {f"secure.{phase}": size})
        sent = {path for part in parts.values() for path in Outline.of(Sum.of(*part)).leaves}
        if withheld := len(sent - total.leaves.keys()):
            books.notes["secure_withheld"] = withheld + books.notes.get("secure_withheld", 0)
        if total.weight:
            error = self.terms(b"", len(call.clients), weight).fixed.error(total.weight, total.count)
            books.notes["secure_error"] = max(error, books.notes.get("secure_error", 0.0))
        return total, list(parts)


def keyed(seed: int, *key: int | str) -> Callable[[int], Entropy]:
    """The entropy of simulated parties: the same in every run, and no secret."""
    return lambda party: numpy_stream(seed, "world", "secure", *key, party).bytes


def fresh(party: int) -> Entropy:
    """The entropy of real parties."""
    return os.urandom


def aggregate(
    contributions: Mapping[int, tuple[Mapping[str, Any], float]],
    asked: Sequence[int],
    lost: Mapping[str, Collection[int]] | None = None,
    secure: Secure | None = None,
    *,
    weight: float = 1.0,
    entropy: Callable[[int], Entropy] = fresh,
    transcript: list[Passed] | None = None,
    device: torch.device | None = None,
) -> Sum:
    """The sum of contributions (client -> fields of its reply, and its weight), as a secure round among the asked.

    `lost` names for each of the PHASES the clients that fall silent in it; `weight` bounds the weights; `transcript`
    takes down every message with its bytes. The sum's `mean()`, `count` and `weight` are those of all who were there
    when masked replies were sent. Raises Abandoned if fewer are left, at any time, than the threshold demands.
    """
    secure, lost = secure or Secure(), lost or {}
    for phase in lost:
        if phase not in PHASES:
            raise unknown("phase of a secure sum", phase, PHASES)
    terms = secure.terms(entropy(SERVER)(16), len(asked), weight)
    if secure.protocol == "ckks":
        from fedloom.boundary.secure.he import ckks as play
    else:
        from fedloom.boundary.secure.rounds import bonawitz as play
    book = transcript if transcript is not None else []
    return play(terms, contributions, asked, lost, entropy, book, device or torch.device("cpu"))


__all__ = ["PHASES", "Abandoned", "Passed", "Secure", "Terms", "aggregate", "fresh", "keyed"]
