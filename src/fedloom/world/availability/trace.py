"""Availability as a file has it: a line for every span of time in which a client can be reached.

    client,start,stop
    0,0,3600
    0,7200,9000
    1,1800,3600

Seconds since the run's beginning; `stop` itself is not in the span. A client without a line is never there; spans of
one client may touch or overlap. After the last `stop` nobody is ever there again, unless `repeat=true` begins anew.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from fedloom.errors import UsageError
from fedloom.world.availability.base import Array, Availability


class Trace(Availability):
    """Spans [start, stop) of clients; those of one client are apart and ascend."""

    def __init__(self, client: Array, start: Array, stop: Array, population: int, repeat: bool = False) -> None:
        self.population = population
        order = np.lexsort((start, client))
        client, start, stop = _merged(client[order], start[order], stop[order])
        self.client, self.start, self.stop = client, start, stop
        self.first = np.searchsorted(client, np.arange(population + 1))  # of each client's spans
        self.end = float(stop.max(initial=0.0))
        self.lap = self.end if repeat else math.inf
        # Those on at a moment: begun by then, not ended by then. Sorted, so that a moment is two searches.
        self.by_start, self.by_stop = np.argsort(start, kind="stable"), np.argsort(stop, kind="stable")

    @staticmethod
    def read(path: str, population: int, repeat: bool = False) -> Trace:
        """The trace of a CSV file with the columns client, start, stop."""
        rows = []
        try:
            with Path(path).open(newline="") as file:
                table = csv.DictReader(file)
                if not {"client", "start", "stop"} <= set(table.fieldnames or ()):
                    raise UsageError(f"the trace {path} has columns {table.fieldnames}; it needs client, start, stop")
                for row in table:
                    rows.append((int(row["client"]), float(row["start"]), float(row["stop"])))  # noqa: PERF401 - counted
        except OSError as error:
            raise UsageError(f"cannot read the trace {path}: {error.strerror}") from error
        except (TypeError, ValueError) as error:
            raise UsageError(f"the trace {path}, row {len(rows) + 1}: {error}") from error
        client, start, stop = np.array(rows, dtype=np.float64).reshape(-1, 3).T
        bad = (client < 0) | (client >= population) | (start < 0) | ~(start < stop) | ~np.isfinite(stop)
        if bad.any():
            place = int(bad.argmax())
            raise UsageError(
                f"the trace {path}, row {place + 1}: {rows[place]} is no span of one of {population} clients "
                "(client from 0, start at least 0 and below stop)"
            )
        if not rows:
            raise UsageError(f"the trace {path} has no span: nobody would ever be there")
        return Trace(client.astype(np.int64), start, stop, population, repeat)

    def mask(self, round: int, now: float) -> Array:
        began = self._began(self._number(now))
        begun = np.searchsorted(began + self.start[self.by_start], now, side="right")
        ended = np.searchsorted(began + self.stop[self.by_stop], now, side="right")
        count = np.zeros(self.population, dtype=np.int64)
        np.add.at(count, self.client[self.by_start[:begun]], 1)
        np.subtract.at(count, self.client[self.by_stop[:ended]], 1)
        return count > 0

    def leaves(self, client: int, began: float, end: float) -> float | None:
        number = self._number(began)
        spans = slice(self.first[client], self.first[client + 1])
        start, stop = self.start[spans], self.stop[spans]
        place = int(np.searchsorted(self._began(number) + start, began, side="right")) - 1
        if place < 0:
            return began
        gone = self._began(number) + float(stop[place])
        # A span up to the end of a lap goes on if the next lap begins with one.
        while stop[place] == self.lap and start[0] == 0.0 and gone < end:
            number, place = number + 1, 0
            gone = self._began(number) + float(stop[0])
        return gone if gone < end else None

    def next(self, now: float) -> float | None:
        number = self._number(now)
        starts = self._began(number) + self.start[self.by_start]
        ahead = np.searchsorted(starts, now, side="right")
        if ahead < len(starts):
            return float(starts[ahead])
        return self._began(number + 1) + float(self.start.min()) if self.lap < math.inf else None

    def _number(self, now: float) -> int:
        """The lap that a moment is in, from 0 on."""
        if self.lap == math.inf:
            return 0
        number = math.floor(now / self.lap)
        return number + (self._began(number + 1) <= now) - (self._began(number) > now)

    def _began(self, number: int) -> float:
        """When a lap began. Moments are compared as they are computed from it: `now % lap` may miss by a rounding."""
        return number * self.lap if number else 0.0


def _merged(client: Array, start: Array, stop: Array) -> tuple[Array, Array, Array]:
    """Spans of one client that touch or overlap, as one; sorted by client and start."""
    kept: list[list[float]] = []
    for c, a, b in zip(client.tolist(), start.tolist(), stop.tolist(), strict=True):
        if kept and kept[-1][0] == c and a <= kept[-1][2]:
            kept[-1][2] = max(kept[-1][2], b)
        else:
            kept.append([c, a, b])
    columns = np.array(kept, dtype=np.float64).reshape(-1, 3).T
    return columns[0].astype(np.int64), columns[1], columns[2]
