"""What may happen to a reply on its way: at the client that sends it, and between the client and the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from fedloom.boundary import Boundary
    from fedloom.engines import Call, Outcome
    from fedloom.node import Client
    from fedloom.site import Site

Reply = dict[str, Any]  # the fields that a client function returns


class Layer:
    """Wraps the client functions of a run's training rounds, in whatever process they run; methods know nothing of it.

    A layer is frozen data, as a method is: it travels to the workers. What it remembers of a client is in
    `client.state` under names that begin with an underscore; its draws come from `client.rng(purpose)` under purposes
    that begin with its own name, so that it moves no stream of the method's.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"train"})  # of calls that it acts in

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Reply]) -> Reply:
        """The reply that leaves the client; `inner` gives what the layers further inside make of it."""
        return inner()

    def arrive(self, call: Call, client: int, reply: Reply, site: Site | None = None) -> Reply:
        """What the server takes a reply for: undoes, before anything is summed, what `around` did for the way."""
        return reply


class Transit:
    """What may happen to the replies of a call between the clients and the server, with all of them in view."""

    kinds: ClassVar[frozenset[str]] = frozenset({"train"})  # of calls that it acts in

    def carry(self, boundary: Boundary, call: Call, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes as they reach the server's door, which turns away those that have a `fault`.

        `boundary.notes` takes numbers for the round's record.
        """
        return list(outcomes)
