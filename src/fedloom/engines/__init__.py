"""Engines carry a client-function call to where the client lives: one file each, by name."""

from __future__ import annotations

import importlib

from fedloom.engines.base import Engine
from fedloom.errors import unknown

ENGINES = {"serial": "Serial", "loopback": "Loopback", "pool": "Pool", "ray": "Ray", "vectorized": "Vectorized"}


def build(name: str, workers: int = 0, threads: int = 1) -> Engine:
    """The engine of that name, with so many workers of so many threads where it has some.

    0 workers are one a core; for `vectorized`, none: it trains in this process.
    """
    if name not in ENGINES:
        raise unknown("engine", name, [*ENGINES, "auto"])
    if name == "vectorized" and workers > 1:
        from fedloom.engines.pool import Pool

        return Pool(workers, threads, together=True)
    engine: type[Engine] = getattr(importlib.import_module(f"fedloom.engines.{name}"), ENGINES[name])
    return engine(workers, threads)


__all__ = ["ENGINES", "Engine", "build"]
