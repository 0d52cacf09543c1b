"""The ledger: exact payload bytes by round, kind, verb, direction, function, field and client."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.calls import Call

Party = int | tuple[int, int]  # a client, or the edge (from, to) between two


class Ledger:
    """Books of the current round; `close` hands its lines over and starts a new page, so memory does not grow.

    Lines and parties are sorted: the order in which replies arrive leaves no trace.
    """

    def __init__(self) -> None:
        # Messages that are alike in everything, the sizes of their fields included: who sent or got one.
        self.page: dict[tuple[int, str, str, str, str, tuple[tuple[str, int], ...]], list[Party]] = {}

    def charge(
        self, round: int, call: Call, direction: str, parties: Sequence[Party], sizes: Mapping[str, int]
    ) -> bool:
        """Books a message of `sizes` bytes by field for each party, in the round in which it travels.

        Evaluation is booked apart. Returns whether it is the first of its like on this page.
        """
        if not parties:
            return False
        alike = (round, call.kind, call.verb, direction, call.function, tuple(sizes.items()))
        booked = self.page.get(alike)
        if booked is None:
            self.page[alike] = list(parties)
            return True
        booked.extend(parties)
        return False

    @property
    def totals(self) -> dict[str, int]:
        """The page's bytes by direction."""
        totals = dict.fromkeys(TOTALS, 0)
        for (_, kind, _, direction, _, sizes), parties in self.page.items():
            name = f"eval_{direction}_bytes" if kind == "evaluate" else f"{direction}_bytes"
            for _, size in sizes:
                totals[name] += size * len(parties)
        return totals

    def close(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The page's lines in the form of `ledger.jsonl`, and its totals by direction."""
        fields = defaultdict[tuple[int, str, str, str, str, str, int], list[Party]](list)
        for (round, kind, verb, direction, function, sizes), parties in self.page.items():
            for field, size in sizes:
                fields[round, kind, verb, direction, function, field, size].extend(parties)
        lines = [
            {
                "round": round,
                "kind": kind,
                "verb": verb,
                "direction": direction,
                "function": function,
                "field": field,
                "bytes": size,
                "edges" if direction == "peer" else "clients": sorted(parties),
            }
            for (round, kind, verb, direction, function, field, size), parties in sorted(fields.items())
        ]
        totals = self.totals
        self.page = {}
        return lines, totals


TOTALS = ("up_bytes", "down_bytes", "peer_bytes", "eval_up_bytes", "eval_down_bytes")
