"""Engines carry a client-function call to where the client lives: one file each, by name; packages may add some."""

from __future__ import annotations

from fedloom.engines.base import Engine
from fedloom.errors import unknown
from fedloom.members import Registry

_OWN = {"serial": "Serial", "loopback": "Loopback", "pool": "Pool", "ray": "Ray", "vectorized": "Vectorized"}
ENGINES = Registry[type[Engine]](
    "engine", "fedloom.engines", {name: f"fedloom.engines.{name}:{cls}" for name, cls in _OWN.items()}, Engine
)


def build(name: str, workers: int = 0, threads: int = 1) -> Engine:
    """The engine of that name, with so many workers of so many threads where it has some.

    0 workers are one a core; for `vectorized`, none: it trains in this process.
    """
    if name not in ENGINES:
        raise unknown("engine", name, [*ENGINES, "auto"])
    if name == "vectorized" and workers > 1:
        from fedloom.engines.pool import Pool

        return Pool(workers, threads, together=True)
    return ENGINES[name](workers, threads)


__all__ = ["ENGINES", "Engine", "build"]
