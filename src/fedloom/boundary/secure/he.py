"""Sums under homomorphic encryption: clients encrypt, the server adds what it cannot read, one client decrypts the sum.

CKKS (Cheon, Kim, Kim, Song, Homomorphic encryption for arithmetic of approximate numbers, 2017) as TenSEAL offers it.
What is encrypted are the whole numbers of `FixedPoint`, and the scale is so large that the noise of encryption stays
below one half: rounded, the sum is exact, and the randomness of the ciphertexts leaves no trace in it. What a sum that
was not rounded would tell of the secret key (Li, Micciancio, IACR 2020/1533), this one does not.

Keys and ciphertexts are read in a process of their own (`cipher`), which dies alone of what strangers send.

One client of each sum, the key holder, makes the keys. It learns the sum, as the server does. If the two conspire, they
read every reply; Bonawitz's protocol has no such pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedloom.boundary.secure.cipher import SLOTS, WORKER, CipherError
from fedloom.boundary.secure.field import Lanes
from fedloom.boundary.secure.outline import Outline
from fedloom.boundary.secure.rounds import Contributions, Lost, Post
from fedloom.boundary.secure.shamir import Entropy
from fedloom.boundary.secure.terms import Abandoned, Passed, Terms, read, written
from fedloom.errors import RunError
from fedloom.mean import Sum


def worked(who: str, what: str, *parts: bytes) -> list[bytes]:
    """What the process of ciphers makes of the bytes that somebody sent; raises RunError if they are not good."""
    try:
        return WORKER.ask(what, *parts)
    except CipherError as error:
        raise RunError(f"secure aggregation: {who} sent {error}") from error


class KeyHolder:
    """The client that makes the keys of one sum and decrypts it."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.secret, self.public = worked("the key holder", "keys", b"%d" % terms.fixed.bits)

    def published(self) -> bytes:
        """What the others need to encrypt, and the server to add: no secret is in it."""
        return written(key=self.public)

    def opened(self, total: bytes) -> bytes:
        """The sum in the clear."""
        chunks, size, there = read(total, "the server", sums=list, size=int, count=int)
        self.terms.enough("masked", there, there)
        _ciphertexts("the server", chunks, size)
        (numbers,) = worked("the server", "opened", self.secret, b"%d" % size, *chunks)
        return written(numbers=np.rint(np.frombuffer(numbers)).astype("<i8").tobytes())


class HomomorphicClient:
    """One client in one sum."""

    def __init__(self, terms: Terms, id: int) -> None:
        self.terms, self.id = terms, id
        self.outline = Outline()

    def advertise(self, reply: Sum | None = None) -> bytes:
        """That it is there and, if the reply is there already, its outline."""
        if reply is not None:
            self.outline = Outline.of(reply)
        return written(outline=self.outline.packed() if reply is not None else {})

    def encrypted(self, told: bytes, reply: Sum) -> bytes:
        """The reply, under the key holder's key."""
        key, outline = read(told, "the server", key=bytes, outline=dict)
        if outline:
            self.outline = Outline.unpacked(outline)
        numbers = self.terms.fixed.whole(self.terms.lanes(self.outline, reply, self.id)).astype(np.float64)
        chunks: list[Any] = worked(f"the key holder of client {self.id}", "encrypted", key, numbers.tobytes())
        return written(chunks=chunks)


class HomomorphicServer:
    """Adds ciphertexts. It never has the secret key."""

    def __init__(self, terms: Terms, asked: Sequence[int]) -> None:
        self.terms, self.asked = terms, frozenset(asked)
        self.outlines: dict[int, Outline | None] = {}
        self.sums: list[bytes] = []
        self.present: list[int] = []

    def advertised(self, client: int, data: bytes) -> None:
        """A client is there."""
        self._new(client, self.asked, self.outlines)
        (outline,) = read(data, f"client {client}", outline=dict)
        self.outlines[client] = Outline.unpacked(outline) if outline else None

    def appointed(self) -> int:
        """The client that is to hold the keys."""
        self.terms.enough("advertise", len(self.outlines), len(self.asked))
        return min(self.outlines)

    def published(self, holder: int, data: bytes) -> bytes:
        """From the key holder to everybody: the public key, and what is summed, unless all outlines are alike."""
        (key,) = read(data, f"client {holder}", key=bytes)
        worked(f"the key holder {holder}", "public", key)
        self.key = key
        told = [outline for _, outline in sorted(self.outlines.items()) if outline]
        self.outline = Outline.agreed(told, self.terms.quorum)
        alike = all(outline == self.outline for outline in self.outlines.values())
        return written(key=key, outline={} if alike else self.outline.packed())

    def took(self, client: int, data: bytes) -> None:
        """A client's ciphertexts, added to the others."""
        self._new(client, self.outlines, self.present)
        (chunks,) = read(data, f"client {client}", chunks=list)
        size = self.outline.weights + self.outline.numbers
        _ciphertexts(f"client {client}", chunks, size)
        self.sums = worked(f"client {client}", "added", self.key, b"%d" % size, *self.sums, *chunks)
        self.present.append(client)

    def arrived(self) -> bytes:
        """To the key holder: the encrypted sum."""
        self.terms.enough("masked", len(self.present), len(self.asked))
        self.terms.shared(self.outline, [self.outlines[client] for client in self.present])
        size = self.outline.weights + self.outline.numbers
        sums: list[Any] = list(self.sums)
        return written(sums=sums, size=size, count=len(self.present))

    def total(self, holder: int, data: bytes, device: torch.device) -> Sum:
        """The sum of the replies that arrived."""
        (numbers,) = read(data, f"client {holder}", numbers=bytes)
        if len(numbers) != 8 * (self.outline.weights + self.outline.numbers):
            raise RunError(f"secure aggregation: the key holder {holder} sent a sum of {len(numbers)} bytes")
        lanes: Lanes = np.frombuffer(numbers, "<i8").astype(self.terms.fixed.dtype)
        return self.terms.total(self.outline, lanes, len(self.present), device)

    def _new(self, client: int, among: Any, before: Any) -> None:
        if client not in among or client in before:
            raise RunError(f"secure aggregation: a message of client {client}, who is out of the sum or has spoken")


def ckks(
    terms: Terms,
    contributions: Contributions,
    asked: Sequence[int],
    lost: Lost,
    entropy: Callable[[int], Entropy],
    transcript: list[Passed],
    device: torch.device,
) -> Sum:
    """As `rounds.bonawitz`. A key holder that is lost takes the sum with it; `entropy` is the library's own here."""
    post, server = Post(asked, lost, transcript), HomomorphicServer(terms, asked)
    parties = {client: HomomorphicClient(terms, client) for client in post.speaking("advertise")}
    for client, party in parties.items():
        reply = Sum.of(*contributions[client]) if client in contributions else None
        server.advertised(client, post.up("advertise", client, party.advertise(reply)))
    chosen = server.appointed()
    post.down("advertise", chosen, written(holder=True))

    _staying(post, chosen, "share")
    holder = KeyHolder(terms)
    key = server.published(chosen, post.up("share", chosen, holder.published()))
    told = {client: post.down("share", client, key) for client in post.here}

    for client in post.speaking("masked"):
        if client not in contributions:
            raise RunError(f"client {client} takes part in a secure sum, and has nothing to give")
        encrypted = parties[client].encrypted(told[client], Sum.of(*contributions[client]))
        server.took(client, post.up("masked", client, encrypted))
    total = post.down("masked", chosen, server.arrived())
    _staying(post, chosen, "unmask")
    return server.total(chosen, post.up("unmask", chosen, holder.opened(total)), device)


def _ciphertexts(who: str, chunks: list[Any], size: int) -> None:
    """Raises RunError for what are not the ciphertexts of so many numbers."""
    expected = -(-size // SLOTS)
    if len(chunks) != expected or not all(type(chunk) is bytes for chunk in chunks):
        raise RunError(f"secure aggregation: {who} sent {len(chunks)} ciphertexts, expected {expected}")


def _staying(post: Post, holder: int, phase: str) -> None:
    if holder not in post.speaking(phase):
        raise Abandoned(
            f"secure aggregation was given up at {phase!r}: the key holder {holder} was lost; nothing was revealed"
        )
