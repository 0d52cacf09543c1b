"""One act of the server, in streams of its own and on a page of its own in the books."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedloom.random import seeded

if TYPE_CHECKING:
    from fedloom.boundary import Boundary
    from fedloom.node import Server


@contextmanager
def acting(boundary: Boundary, server: Server, kind: str, round: int) -> Iterator[None]:
    """Inside, the server acts in `setup`, `train`, `finish` or `evaluate` of a round."""
    boundary.server = server
    boundary.begin(kind, round)
    server.begin(kind, round)
    server.enter(boundary.method.phases(server), round)
    with seeded(server.site.seed, *server.key, "torch"):
        yield
