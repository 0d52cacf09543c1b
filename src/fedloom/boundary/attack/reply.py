"""Attackers that tamper with their reply, each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedloom.boundary.attack.numbers import Sent
from fedloom.boundary.attack.part import Inner, Part
from fedloom.calls import Fields

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.node import Client


@dataclass(frozen=True)
class Tampering(Part):
    """Works honestly and sends something else."""

    def act(self, client: Client, call: Call, sent: Sent, inner: Inner) -> Fields:
        reply = inner()
        return sent.filled(reply, self.tampered(sent.row(reply), client))

    def tampered(self, honest: Tensor, client: Client) -> Tensor:
        """What is sent in place of the honest row [D]."""
        raise NotImplementedError

    def noise(self, like: Tensor, client: Client, std: float) -> Tensor:
        """Gaussian noise [D] of the client's own."""
        draw = client.rng(f"attack {self.name()}")
        return std * torch.randn(like.shape, generator=draw, dtype=like.dtype).to(like.device)


@dataclass(frozen=True)
class SignFlip(Tampering):
    """The opposite of what it found: -scale times its update (Li et al. 2019, arXiv 1811.03761)."""

    scale: float = 1.0  # how many times its update

    def tampered(self, honest: Tensor, client: Client) -> Tensor:
        return -self.scale * honest


@dataclass(frozen=True)
class Gaussian(Tampering):
    """Noise in place of its update (Blanchard et al. 2017, arXiv 1703.02757, where the deviation is 200)."""

    std: float = 1.0  # deviation of every number

    def tampered(self, honest: Tensor, client: Client) -> Tensor:
        return self.noise(honest, client, self.std)


@dataclass(frozen=True)
class Zero(Tampering):
    """Nothing but zeros."""

    def tampered(self, honest: Tensor, client: Client) -> Tensor:
        return torch.zeros_like(honest)


@dataclass(frozen=True)
class FreeRider(Tampering):
    """Does no work and sends back what it got, or noise that fades as training would.

    Fraboni, Vidal, Lorenzi: Free-rider Attacks on Model Aggregation in Federated Learning, arXiv 2006.11901: plain with
    std=0, disguised with N(0, (std * round^-decay)^2). Its gradient steps do not count: they only give its replies
    their form, and its memory what later calls of a round ask for.
    """

    std: float = 0.0  # sigma: deviation of the disguise
    decay: float = 1.0  # gamma: how fast it fades; the paper tries 0.5, 1 and 2

    def act(self, client: Client, call: Call, sent: Sent, inner: Inner) -> Fields:
        reply = super().act(client, call, sent, inner)
        client.steps = client.samples = 0
        client.logs.clear()
        return reply

    def tampered(self, honest: Tensor, client: Client) -> Tensor:
        return self.noise(honest, client, self.std * max(client.round, 1) ** -self.decay)
