"""What methods share whose clients' work overlaps: who is asked next, and what old work still counts."""

from __future__ import annotations

from typing import Any

import torch

from fedloom.cohort import Cohort, Replies, Reply
from fedloom.vector import Vector


def idle_up_to_cohort(cohort: Cohort, generator: torch.Generator) -> Cohort:
    """Idle clients of the cohort: so many that, with those at work, there are no more than the cohort has.

    If more are idle, the generator draws among them.
    """
    idle, free = cohort.idle, max(0, len(cohort) - cohort.working)
    if len(idle) <= free:
        return idle
    order = torch.randperm(len(idle), generator=generator)[:free]
    return cohort.clients_by_id(idle[place] for place in order.tolist())


def seconds_a_step(reply: Reply, steps: int) -> float:
    """How long a client's step took, messages included: at least a nanosecond, for the clock may stand still."""
    return max(reply.seconds / max(1, steps), 1e-9)


def staleness_weight(staleness: float, power: float) -> float:
    """The weight (1 + staleness)^-power of old work: 1 if it is fresh."""
    return float((1 + staleness) ** -power)


def discount_by_staleness(replies: Replies, power: float) -> Replies:
    """Replies whose `delta` is weighted by its staleness; a mean still divides by their number."""
    return Replies(
        [
            Reply(
                reply.client,
                reply.fields | {"delta": staleness_weight(reply.staleness, power) * reply.delta},
                reply.staleness,
                reply.seconds,
            )
            for reply in replies
        ],
        replies.asked,
        replies.failures,
    )


def update_message(w: Vector, model: Vector) -> dict[str, Any]:
    """What a client says of its work: `delta`, of the parameters, and the running `statistics` if there are some.

    Statistics go as they are: added to a newer model, the difference to an old one could make a variance negative.
    """
    statistics = {"statistics": w.buffers} if len(w.buffers) else {}
    return {"delta": (w - model).params, **statistics}


def apply_update(model: Vector, up: Any, rate: float, share: float) -> Vector:
    """The model, `rate` times a `delta` on; its statistics go by `share` of the way (1: all) towards those of `up`."""
    moved = model.merge(model.params + rate * up.delta)
    if "statistics" not in up.fields:
        return moved
    return moved.merge((1 - share) * model.buffers + share * up.statistics)
