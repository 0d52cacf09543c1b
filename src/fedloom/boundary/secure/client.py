"""The client's side of the protocol of Bonawitz et al.: what it knows, what it says, and what it refuses.

Keith Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017 (the longer
version is IACR 2017/281), figure 4. With an identity, also what the figure underlines, against servers that lie:
signed keys, and a consistency check before anything is unmasked. The figure's replies are vectors of one length; as
ours have outlines, clients sign those too, work out themselves what is summed, and check that all took it for the same:
a server could else give every client's numbers a place of their own in the sum.
"""

from __future__ import annotations

import os
from typing import Any

from fedloom.boundary.secure import keys, shamir
from fedloom.boundary.secure.outline import Outline
from fedloom.boundary.secure.shamir import SHARE, Entropy
from fedloom.boundary.secure.terms import Terms, arrived_of, has_of, keys_of, read, table, written
from fedloom.errors import RunError
from fedloom.mean import Sum


class SecureClient:
    """One client in one sum. Its methods are its messages, called in their order, each once.

    `entropy` gives its keys: `os.urandom` wherever there is something to protect.
    """

    def __init__(
        self, terms: Terms, id: int, entropy: Entropy = os.urandom, identity: keys.Identity | None = None
    ) -> None:
        if terms.signed and identity is None:
            raise RunError(f"client {id} cannot take part in a signed sum: it has no identity")
        self.terms, self.id, self.entropy, self.identity = terms, id, entropy, identity
        self.letter_key = entropy(keys.KEY)  # c_u^SK
        self.mask_key = entropy(keys.KEY)  # s_u^SK
        self.own_seed = entropy(keys.KEY)  # b_u
        self.outline = Outline()
        self.said = 0

    def advertise(self, reply: Sum | None = None) -> bytes:
        """Two public keys and, if the reply is there already, its outline."""
        self._speak("advertise")
        if reply is not None:
            self.outline = Outline.of(reply)
        letter, mask = keys.public(self.letter_key), keys.public(self.mask_key)
        self.has = has_of(self.outline if reply is not None else None)
        signed = self._signed(keys_of(self.terms.session, self.id, letter, mask, self.has))
        return written(
            letter=letter, mask=mask, outline=self.outline.packed() if reply is not None else {}, signature=signed
        )

    def share(self, roster: bytes) -> bytes:
        """Shares of both secrets, one for every client on the roster, that only it can read."""
        self._speak("share")
        letters, masks, outline, has, signatures = read(
            roster, "the server", letters=dict, masks=dict, outline=dict, has=dict, signatures=dict
        )
        self.letters, self.masks = table(letters, "the server", keys.KEY), table(masks, "the server", keys.KEY)
        if outline and not self.terms.signed:
            self.outline = Outline.unpacked(outline)
        published = [*self.letters.values(), *self.masks.values()]
        mine = (keys.public(self.letter_key), keys.public(self.mask_key))
        if (self.letters.get(self.id), self.masks.get(self.id)) != mine or len({*published}) < 2 * len(self.masks):
            raise RunError(f"client {self.id} leaves the secure sum: the server changed keys, or gave one twice")
        if self.letters.keys() != self.masks.keys():
            raise RunError(f"client {self.id} leaves the secure sum: the roster has one key of some clients, not two")
        self._enough(len(self.letters))
        if self.terms.signed:
            self._agree(table(has, "the server"), signatures)
        if 2 * self.terms.quorum <= len(self.letters):
            raise RunError(
                f"client {self.id} leaves the secure sum: of {len(self.letters)} clients {self.terms.quorum} would do, "
                "and two halves could be asked for two secrets"
            )
        holders = sorted(self.letters)
        seeds = shamir.split(self.own_seed, holders, self.terms.quorum, self.entropy)
        secrets = shamir.split(self.mask_key, holders, self.terms.quorum, self.entropy)
        self.kept = {self.id: secrets[self.id] + seeds[self.id]}  # whose secrets it holds shares of
        sealed: dict[int, Any] = {}
        for peer in holders:
            if peer != self.id:
                letter = secrets[peer] + seeds[peer]
                sealed[peer] = keys.sealed(self._letter_key(peer, self.id, peer), letter, self._about(self.id, peer))
        return written(sealed=sealed)

    def masked(self, mail: bytes, reply: Sum) -> bytes:
        """The reply under a mask of its own and one for every pair with a client that shared its secrets."""
        self._speak("masked")
        (sealed,) = read(mail, "the server", sealed=dict)
        for peer, letter in table(sealed, "the server").items():
            if peer not in self.letters or peer == self.id:
                raise RunError(f"client {self.id} leaves the secure sum: a letter from {peer}, who is not in it")
            opened = keys.opened(self._letter_key(peer, peer, self.id), letter, self._about(peer, self.id))
            if len(opened) != 2 * SHARE:
                raise RunError(f"client {self.id} leaves the secure sum: a letter of {len(opened)} bytes from {peer}")
            self.kept[peer] = opened
        self._enough(len(self.kept))
        lanes = self.terms.lanes(self.outline, reply, self.id)
        keys.mask(lanes, keys.derived(self.own_seed, self.terms.session, "own mask"), 1)
        for peer in self.kept:
            if peer != self.id:
                pair = keys.agreed(self.mask_key, self.masks[peer], self.terms.session, "pair mask")
                keys.mask(lanes, pair, 1 if self.id < peer else -1)
        return written(masked=self.terms.fixed.to_bytes(self.terms.fixed.reduced(lanes)))

    def check(self, arrived: bytes) -> bytes:
        """In a signed sum: a signature under whose replies arrived, and under what is summed."""
        self._speak("check")
        self.arrived = self._present(arrived)
        return written(signature=self._signed(arrived_of(self.terms.session, self.arrived, self.outline)))

    def unmask(self, told: bytes) -> bytes:
        """For every client whose reply arrived the share of its own seed, for every other that of its mask key.

        Never both: together they would lay the reply open. `told` is whose replies arrived; in a signed sum, that the
        others were told what this client was.
        """
        self._speak("unmask")
        if self.terms.signed:
            (signatures,) = read(told, "the server", signatures=dict)
            if not signatures.keys() <= {*self.arrived}:
                raise RunError(f"client {self.id} leaves the secure sum: signatures of clients that are not in it")
            for peer in signatures:
                self._check(peer, arrived_of(self.terms.session, self.arrived, self.outline), signatures)
            self._enough(len(signatures))
        else:
            self.arrived = self._present(told)
        present = {*self.arrived}
        seeds: dict[int, Any] = {peer: share[SHARE:] for peer, share in self.kept.items() if peer in present}
        secrets: dict[int, Any] = {peer: share[:SHARE] for peer, share in self.kept.items() if peer not in present}
        return written(seeds=seeds, secrets=secrets)

    def _agree(self, has: dict[int, bytes], signatures: dict[int, bytes]) -> None:
        """In a signed sum: sees that each client signed its keys and what it has, and what is summed by that."""
        outlines = []
        for peer, letter in self.letters.items():
            its = has.get(peer, b"") if has else self.has  # the server need not repeat what all have alike
            self._check(peer, keys_of(self.terms.session, peer, letter, self.masks[peer], its), signatures)
            (outline,) = read(its, f"client {peer}", outline=dict)
            if outline:
                outlines.append(Outline.unpacked(outline))
        self.outline = Outline.agreed(outlines, self.terms.quorum)

    def _present(self, arrived: bytes) -> list[int]:
        (there,) = read(arrived, "the server", arrived=list)
        if any(type(peer) is not int for peer in there) or there != sorted(self.kept.keys() & {*there}):
            raise RunError(f"client {self.id} leaves the secure sum: replies of clients that are not in it")
        if self.id not in there:
            raise RunError(f"client {self.id} leaves the secure sum: its own reply did not arrive")
        self._enough(len(there))
        present: list[int] = there
        return present

    def _signed(self, what: bytes) -> bytes:
        return self.identity.signed(what) if self.terms.signed and self.identity else b""

    def _check(self, peer: int, what: bytes, signatures: dict[int, bytes]) -> None:
        signature = signatures.get(peer)
        if self.identity is None or type(signature) is not bytes:
            raise RunError(f"client {self.id} leaves the secure sum: no signature of client {peer}")
        self.identity.check(peer, what, signature)

    def _speak(self, phase: str) -> None:
        phases = self.terms.phases
        if self.said == len(phases) or phases[self.said] != phase:
            raise RunError(f"client {self.id} says {phase!r} out of turn: a secure sum has every phase once, in order")
        self.said += 1

    def _enough(self, there: int) -> None:
        if there < self.terms.quorum:
            raise RunError(
                f"client {self.id} leaves the secure sum: {there} clients are in it, {self.terms.quorum} are needed"
            )

    def _letter_key(self, peer: int, sender: int, receiver: int) -> bytes:
        purpose = f"letter {sender} {receiver}"
        return keys.agreed(self.letter_key, self.letters[peer], self.terms.session, purpose)

    def _about(self, sender: int, receiver: int) -> bytes:
        return b"%s %d %d" % (self.terms.session, sender, receiver)
