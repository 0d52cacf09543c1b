"""One secure sum among simulated parties: who says what to whom, and who falls silent when."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from fedloom.boundary.secure.client import SecureClient
from fedloom.boundary.secure.keys import KEY, Identity, derived
from fedloom.boundary.secure.server import SecureServer
from fedloom.boundary.secure.shamir import Entropy
from fedloom.boundary.secure.terms import PHASES, Passed, Terms
from fedloom.errors import RunError
from fedloom.mean import Sum

Contributions = Mapping[int, tuple[Mapping[str, Any], float]]  # client -> fields of its reply, and its weight
Lost = Mapping[str, Collection[int]]  # phase -> clients whose message in it never comes, nor any later one


class Post:
    """Counts the messages as they pass, and knows who still speaks."""

    def __init__(self, asked: Sequence[int], lost: Lost, transcript: list[Passed]) -> None:
        self.here = list(asked)
        self.lost = lost
        self.transcript = transcript

    def speaking(self, phase: str) -> list[int]:
        """Those who still speak in this phase."""
        gone = {client for earlier in PHASES[: PHASES.index(phase) + 1] for client in self.lost.get(earlier, ())}
        self.here = [client for client in self.here if client not in gone]
        return self.here

    def up(self, phase: str, client: int, data: bytes) -> bytes:
        """A message from a client."""
        self.transcript.append(Passed(phase, "up", client, len(data)))
        return data

    def down(self, phase: str, client: int, data: bytes) -> bytes:
        """A message to a client."""
        self.transcript.append(Passed(phase, "down", client, len(data)))
        return data


def bonawitz(
    terms: Terms,
    contributions: Contributions,
    asked: Sequence[int],
    lost: Lost,
    entropy: Callable[[int], Entropy],
    transcript: list[Passed],
    device: torch.device,
) -> Sum:
    """The sum of the contributions of all who were there when masked replies were sent.

    A client may be among the asked and have no contribution only if it is lost by then.
    """
    post, server = Post(asked, lost, transcript), SecureServer(terms, asked)
    parties: dict[int, SecureClient] = {}
    identity = _identities(asked, entropy) if terms.signed else {}
    for client in post.speaking("advertise"):
        parties[client] = SecureClient(terms, client, entropy(client), identity.get(client))
        reply = Sum.of(*contributions[client]) if client in contributions else None
        server.advertised(client, post.up("advertise", client, parties[client].advertise(reply)))
    roster = server.roster()
    told = {client: post.down("advertise", client, roster) for client in post.here}

    for client in post.speaking("share"):
        server.shared(client, post.up("share", client, parties[client].share(told[client])))
    told = {client: post.down("share", client, server.mail_for(client)) for client in post.here}

    for client in post.speaking("masked"):
        if client not in contributions:
            raise RunError(f"client {client} takes part in a secure sum, and has nothing to give")
        masked = parties[client].masked(told.pop(client), Sum.of(*contributions[client]))
        server.took(client, post.up("masked", client, masked))
    arrived = server.arrived()
    told = {client: post.down("masked", client, arrived) for client in post.here}

    if terms.signed:
        for client in post.speaking("check"):
            server.checked(client, post.up("check", client, parties[client].check(told[client])))
        confirmed = server.confirmed()
        told = {client: post.down("check", client, confirmed) for client in post.here}

    for client in post.speaking("unmask"):
        server.unmasked(client, post.up("unmask", client, parties[client].unmask(told[client])))
    return server.total(device)


def _identities(clients: Sequence[int], entropy: Callable[[int], Entropy]) -> dict[int, Identity]:
    """What real clients have from a registry."""
    private = {client: derived(entropy(client)(KEY), b"", "identity") for client in clients}
    registry = {client: Identity.public(key) for client, key in private.items()}
    return {client: Identity(key, registry) for client, key in private.items()}
