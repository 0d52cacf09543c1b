"""What the boundary writes down: of the run, and of the server step that is under way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedloom.boundary.ledger import Ledger
from fedloom.boundary.timeline import Timeline

if TYPE_CHECKING:
    from fedloom.site import Site


class Books:
    """The books of one run. `info` gives what a client registered."""

    def __init__(self, site: Site, info: Callable[[int], Mapping[str, Any]]) -> None:
        self.site = site
        self.info = info
        self.ledger = Ledger()
        self.timeline = Timeline()
        self.memory: dict[str, dict[str, Any]] = {}  # what stages keep from round to round: messages
        self.verbs: dict[str, dict[str, Any]] = {}  # function -> what the server learns from it
        self.shown: set[tuple[str, ...]] = set()  # verb, function and fields that are in `verbs` already
        self.version = 0  # how often the model has moved
        self.pace = 1.0  # the factor on the method's learning rate in this round
        self.labels = 0  # asked for since the last row of the record
        self.begin("setup", 0)

    def begin(self, kind: str, round: int, counted: Iterable[str] = ()) -> None:
        """Opens the page of a server step; of the fates `counted` it notes how many there were."""
        self.kind, self.round, self.nth = kind, round, 0
        self.logs = defaultdict[str, list[tuple[int, float]]](list)  # name -> (client, number)
        self.notes: dict[str, float] = dict.fromkeys(counted, 0)  # numbers for the round's record
        self.judged: dict[int, float] = {}  # client -> its weight in the server's eyes; 0: turned away
        self.asked_in: dict[int, int] = {}  # client -> the round whose call it was judged in: earlier, if submitted
        self.asked = 0  # clients of this round, where the world chose them
        self.drawn: Sequence[int] = ()  # and who they are
        self.steps = 0
        self.replies = 0
        self.came: list[tuple[int, int]] = []  # client and staleness of each reply; unsorted
        self.submitted = False  # whether any was to work that was submitted, so that replies may be stale
        self.summed = False  # whether a mean was taken in this round

    def flagged(self, named: Iterable[int]) -> set[int]:
        """Whom the server turned away in this step: at the door, by a weight of zero, or as `named` by the method."""
        among = self.judged.keys() or {client for client, _ in self.came}
        return {client for client, weight in self.judged.items() if weight == 0} | (among & set(named))

    def show(self, verb: str, function: str, fields: Iterable[str]) -> None:
        """The server learns fields of replies by a verb."""
        shown = (verb, function, *fields)
        if shown not in self.shown:
            self.shown.add(shown)
            use = self.verbs.setdefault(f"{verb} {function}", {"verb": verb, "function": function, "fields": []})
            use["fields"] = sorted({*use["fields"], *fields} - {"envelope"})
