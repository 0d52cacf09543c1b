"""Attackers that change what the client function does: they train towards a goal of their own and push it through."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.boundary.attack.data import Backdoor
from fedloom.boundary.attack.numbers import Sent
from fedloom.boundary.attack.part import Inner
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

    def act(self, client: Client, call: Call, sent: Sent, inner: Inner) -> Fields:
        client.given = self.poisoned(client)
        if self.stay:
            pulled(client, self.stay)
        reply = inner()
        pushed = self.scale * sent.row(reply)
        if self.bound is not None:
            pushed = pushed * (self.bound / pushed.norm().clamp(min=1e-30)).clamp(max=1.0)
        return sent.filled(reply, pushed)


def pulled(client: Client, strength: float) -> None:
    """From now on the client's descents are pulled back to where each begins."""
    plain, signature = client.descend, inspect.signature(client.descend)

    def descend(*args: Any, **options: Any) -> tuple[Vector, int]:
        given = signature.bind(*args, **options)
        start: Vector = given.arguments["w"]
        also: Correction | None = given.arguments.get("correct")

        def correct(here: Vector) -> Vector:
            pull = strength * (here.params - start.params)
            more = also(here) if callable(also) else also
            return pull if more is None else pull + more.params

        given.arguments["correct"] = correct
        return plain(*given.args, **given.kwargs)

    client.descend = descend  # type: ignore[method-assign]
