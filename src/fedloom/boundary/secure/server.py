"""The server's side of the protocol of Bonawitz et al. (see `client`): it passes letters on and sees masked replies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedloom.boundary.secure import keys
from fedloom.boundary.secure.field import Lanes
from fedloom.boundary.secure.outline import Outline
from fedloom.boundary.secure.shamir import SHARE, Interpolation
from fedloom.boundary.secure.terms import Terms, has_of, read, table, written
from fedloom.errors import RunError
from fedloom.mean import Sum


class SecureServer:
    """Takes the clients' messages as they come, phase by phase; each phase ends with what it says to those left.

    Whoever does not speak in a phase is out. Raises Abandoned as soon as fewer than the quorum are left.
    """

    def __init__(self, terms: Terms, asked: Iterable[int]) -> None:
        self.terms = terms
        self.asked = frozenset(asked)
        self.letters: dict[int, bytes] = {}
        self.masks: dict[int, bytes] = {}
        self.signatures: dict[int, bytes] = {}
        self.outlines: dict[int, Outline] = {}
        self.mail: dict[int, dict[int, bytes]] = {}  # sender -> receiver -> letter
        self.sum: Lanes | None = None  # of masked replies: no single one is kept
        self.present: list[int] = []  # whose masked replies are in it
        self.checks: dict[int, bytes] = {}
        self.shares: dict[int, tuple[dict[int, bytes], dict[int, bytes]]] = {}

    def advertised(self, client: int, data: bytes) -> None:
        """A client's public keys."""
        self._new(client, self.asked, self.letters)
        letter, mask, outline, signature = read(
            data, f"client {client}", letter=bytes, mask=bytes, outline=dict, signature=bytes
        )
        table({0: letter, 1: mask}, f"client {client}", keys.KEY)
        if outline:
            self.outlines[client] = Outline.unpacked(outline)
        self.letters[client], self.masks[client] = letter, mask
        if self.terms.signed:
            self.signatures[client] = signature

    def roster(self) -> bytes:
        """To everybody: who is there, with which public keys, and what is summed, unless all outlines are alike.

        In a signed sum clients are told what each of them has, and see themselves what is summed.
        """
        self._enough("advertise", self.letters)
        outlines = [self.outlines[client] for client in sorted(self.outlines)]
        self.outline = Outline.agreed(outlines, self.terms.quorum)
        alike = len(outlines) == len(self.letters) and all(outline == self.outline for outline in outlines)
        return written(
            letters=dict(sorted(self.letters.items())),
            masks=dict(sorted(self.masks.items())),
            outline={} if alike or self.terms.signed else self.outline.packed(),
            has={} if alike or not self.terms.signed else self._has(),
            signatures=dict(sorted(self.signatures.items())),
        )

    def shared(self, client: int, data: bytes) -> None:
        """A client's sealed shares for the others."""
        self._new(client, self.letters, self.mail)
        (sealed,) = read(data, f"client {client}", sealed=dict)
        letters = table(sealed, f"client {client}")
        if letters.keys() != self.letters.keys() - {client}:
            raise RunError(f"secure aggregation: client {client} has no letter for every other client")
        self.mail[client] = letters

    def mail_for(self, client: int) -> bytes:
        """To one client: the letters of all who shared their secrets."""
        self._enough("share", self.mail)
        sealed: dict[int, Any] = {sender: self.mail[sender][client] for sender in sorted(self.mail) if sender != client}
        return written(sealed=sealed)

    def took(self, client: int, data: bytes) -> None:
        """A client's masked reply, added to the others."""
        self._new(client, self.mail, self.present)
        (masked,) = read(data, f"client {client}", masked=bytes)
        expected = (self.outline.weights + self.outline.numbers) * self.terms.fixed.bits // 8
        if len(masked) != expected:
            raise RunError(f"secure aggregation: client {client} sent {len(masked)} masked bytes, expected {expected}")
        lanes = self.terms.fixed.from_bytes(masked)
        self.sum = lanes if self.sum is None else self.sum + lanes
        self.present.append(client)

    def arrived(self) -> bytes:
        """To those whose masked reply arrived: who they are."""
        self._enough("masked", self.present)
        self.terms.shared(self.outline, [self.outlines.get(client) for client in self.present])
        return written(arrived=sorted(self.present))

    def checked(self, client: int, data: bytes) -> None:
        """In a signed sum: a client's signature under whose replies arrived."""
        self._new(client, self.present, self.checks)
        (self.checks[client],) = read(data, f"client {client}", signature=bytes)

    def confirmed(self) -> bytes:
        """To those who signed whose replies arrived: all signatures."""
        self._enough("check", self.checks)
        return written(signatures=dict(sorted(self.checks.items())))

    def unmasked(self, client: int, data: bytes) -> None:
        """A client's shares of the others' secrets."""
        self._new(client, self.checks if self.terms.signed else self.present, self.shares)
        seeds, secrets = read(data, f"client {client}", seeds=dict, secrets=dict)
        who = f"client {client}"
        if seeds.keys() != {*self.present} or secrets.keys() != self.mail.keys() - {*self.present}:
            raise RunError(
                f"secure aggregation: {who} sent shares of {len(seeds) + len(secrets)} secrets, not those asked"
            )
        self.shares[client] = table(seeds, who, SHARE), table(secrets, who, SHARE)

    def lanes(self) -> Lanes:
        """The sum of the replies that arrived, as whole numbers mod 2^bits."""
        self._enough("unmask", self.shares)
        assert self.sum is not None
        holders = sorted(self.shares)[: self.terms.quorum]
        join, session, total = Interpolation(holders), self.terms.session, self.sum.copy()
        for client in sorted(self.present):
            seed = join.secret({holder: self.shares[holder][0][client] for holder in holders})
            keys.mask(total, keys.derived(seed, session, "own mask"), -1)
        for gone in sorted(self.mail.keys() - {*self.present}):
            secret = join.secret({holder: self.shares[holder][1][gone] for holder in holders})
            if keys.public(secret) != self.masks[gone]:
                raise RunError(f"secure aggregation: the shares of client {gone}'s mask key give another key")
            for peer in sorted(self.present):
                # What the peer added for this pair, or took off.
                keys.mask(total, keys.agreed(secret, self.masks[peer], session, "pair mask"), -1 if peer < gone else 1)
        return self.terms.fixed.reduced(total)

    def total(self, device: Any = "cpu") -> Sum:
        """The sum of the replies that arrived."""
        return self.terms.total(self.outline, self.lanes(), len(self.present), device)

    def _has(self) -> dict[int, Any]:
        return {client: has_of(self.outlines.get(client)) for client in sorted(self.letters)}

    def _new(self, client: int, among: Iterable[int], before: Iterable[int]) -> None:
        if client not in among or client in before:
            raise RunError(f"secure aggregation: a message of client {client}, who is out of the sum or has spoken")

    def _enough(self, phase: str, there: Any) -> None:
        self.terms.enough(phase, len(there), len(self.asked))
