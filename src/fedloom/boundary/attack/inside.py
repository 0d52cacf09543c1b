"""Attackers that change what the client function does: they train towards a goal of their own and push it through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.boundary.attack.data import Backdoor
from fedloom.boundary.attack.numbers import Sent
from fedloom.boundary.attack.part import Inner, Training
from fedloom.calls import Fields

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.node import Client, Correction
    from fedloom.vector import Vector


@dataclass(frozen=True)
class ModelReplacement(Backdoor):
    """A backdoored model, scaled up so that it survives the average, and constrained so that it looks harmless.

    Bagdasaryan, Veit, Hua, Estrin, Shmatikov: How To Backdoor Federated Learning, arXiv 1807.00459: X = gamma (w - G)
    is sent, and gamma = n / eta replaces the average altogether. Its constrain-and-scale adds a term for anomaly to the
    loss; here it is the squared distance from the received model, in whatever `descend` the method calls. Sun, Kairouz,
    Suresh, McMahan: Can You Really Backdoor Federated Learning?, arXiv 1911.07963: what is sent stays within `bound`.
    """

    scale: float = 10.0  # gamma: the papers' for 10 clients a round
    stay: float = 0.0  # rho: loss + rho / 2 |w - G|^2; (1 - alpha) / alpha in the words of Bagdasaryan et al.
    bound: float | None = None  # M: the greatest length of what is sent; Sun et al.

    @property
    def trains(self) -> bool:
        return self.stay > 0

    def train(self, client: Client, honest: Training, w: Vector, lr: float, **options: Any) -> tuple[Vector, int]:
        also: Correction | None = options.pop("correct", None)

        def correct(here: Vector) -> Vector:
            pull = self.stay * (here.params - w.params)
            more = also(here) if callable(also) else also
            return pull if more is None else pull + more.params

        return honest(w, lr, correct=correct, **options)

    def act(self, client: Client, call: Call, sent: Sent, inner: Inner) -> Fields:
        client.given = self.poisoned(client)
        reply = inner()
        pushed = self.scale * sent.row(reply)
        if self.bound is not None:
            pushed = pushed * (self.bound / pushed.norm().clamp(min=1e-30)).clamp(max=1.0)
        return sent.filled(reply, pushed)
