"""What passes between the server and everybody once a run, before anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom import encoding
from fedloom.calls import Call

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.site import Site
    from fedloom.world import World
    from fedloom.world.clock import Clock


def register(books: Books, world: World, clock: Clock) -> None:
    """Books what clients tell of their devices, and the shared data that everybody is sent.

    Beforehand clients are known by their task only. The clock stands where the slowest has the shared data; newcomers
    get them too, which is booked as evaluation.
    """
    everybody = range(world.population)
    if profile := world.profile(0):
        call = Call("register", "info", (), {}, {}, books.kind, books.round, 0)
        books.ledger.charge(books.round, call, "up", everybody, encoding.sizes({"info": {**profile}}))
    sizes = shipped(books.site)
    if not sizes:
        return
    late = range(world.population, world.population + books.site.task.newcomers)
    for kind, clients in ((books.kind, everybody), ("evaluate", late)):
        call = Call("ship", "shared_data", (), {}, {}, kind, books.round, 0)
        books.ledger.charge(books.round, call, "down", clients, sizes)
    if world.has_timing:
        clock.reach(clock.now + max(world.trip(k, sum(sizes.values()), 0, 0).down for k in everybody))


def shipped(site: Site) -> dict[str, int]:
    """The bytes, by field, of the shared data as every client is sent them; none where the method needs none."""
    data = site.task.shared_data() if "shared_data" in site.needs else None
    return {} if data is None else encoding.sizes({"x": data.x})
