"""The clients of a round, and the verbs by which a server speaks to them.

Which verb a method uses is its privacy statement: under `mean` the server learns only an average, under `means` one a
group, under `call`,
`stream` and `wait` it sees each reply, under `exchange`, `tell` and `work` it sees nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from operator import index
from typing import TYPE_CHECKING, Any, Protocol

from fedloom.errors import NobodyReplied, RunError, UsageError
from fedloom.mean import Placed, Sum, split_weight

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.world.clock import Clock

INBOX = "inbox"  # the argument in which a client finds what its peers have sent


class Each(dict[int, Any]):
    """A per-client argument: `model=Each({client: value})`. Every client addressed must be in it.

    Examples:
        >>> models = fedloom.Each({0: "small", 1: "large"})
        >>> models[1]
        'large'
    """


@dataclass(frozen=True)
class Once:
    """A message field that every client is sent in full one time: `encoder=Once(weights)`, or inside Each or ByGroup.

    The client keeps the value; from then on its name goes down in its place, 16 bytes. It is sent in full again to who
    did not reply in time, or if the field has another value than last time.

    Examples:
        >>> fedloom.Once(0.5).value
        0.5
    """

    value: Any


class ByGroup(dict[int | str, Any]):
    """An argument by group: `cohort.means(fn, groups, model=ByGroup({group: value}))`. It has every group asked.

    Examples:
        >>> models = fedloom.ByGroup({"north": 1.0, "south": 2.0})
        >>> models["south"]
        2.0
    """


class Reply:
    """What a client function returned: its fields as attributes, the `client`, and how it came.

    `staleness`: how often the model has moved since it was asked: the rounds that set `server.model` (for a method
    without a global model, those that heard of somebody). `seconds`: how long it took, by the world's clock, both ways
    included.

    Examples:
        >>> reply = fedloom.Reply(3, {"delta": 0.5, "n": 20})
        >>> reply.client, reply.delta, reply.n
        (3, 0.5, 20)
    """

    def __init__(self, client: int, fields: Mapping[str, Any], staleness: int = 0, seconds: float = 0.0) -> None:
        self.client = client
        self.staleness = staleness
        self.seconds = seconds
        self.fields = dict(fields)

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"the reply of client {self.client} has no field {name!r}; it has {', '.join(fields)}")

    def __repr__(self) -> str:
        return f"Reply(client={self.client}, {', '.join(self.fields)})"


class Replies(list[Reply]):
    """Replies in the cohort's order, with the clients whose reply is `missing` and, deployed, their `failures`.

    Examples:
        >>> came = [fedloom.Reply(0, {"x": 1.0, "n": 1}), fedloom.Reply(2, {"x": 4.0, "n": 2})]
        >>> replies = fedloom.Replies(came, asked=[0, 1, 2])
        >>> replies.missing, replies.mean("x", weight="n").x
        ((1,), 3.0)
    """

    def __init__(
        self, replies: Iterable[Reply], asked: Iterable[int], failures: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(replies)
        answered = {reply.client for reply in self}
        self.asked = tuple(asked)
        self.missing = tuple(filterfalse(answered.__contains__, self.asked))
        self.failures = dict(failures or {})

    def mean(self, *fields: str, weight: str | None = None) -> Mean:
        """The (weighted) mean of some fields, or of all: bitwise what `Cohort.mean` makes of the same replies.

        Raises NobodyReplied if there is no reply.
        """
        sums = Placed(sorted(self.asked))
        for reply in sorted(self, key=lambda reply: reply.client):  # whoever was the first to end its work
            whole, number = split_weight("mean of replies", reply.client, reply.fields, weight)
            kept = {name: value for name, value in whole.items() if not fields or name in fields}
            sums.add(reply.client, Sum.of(kept, number))
        return Mean.of(sums.total(), self.asked, self.missing, "this call")


@dataclass(frozen=True)
class Mean:
    """The (weighted) mean of the replies: fields as attributes, `count` of replies, their total `weight`, `missing`.

    Examples:
        >>> up = fedloom.Replies([fedloom.Reply(0, {"x": 1.0}), fedloom.Reply(1, {"x": 2.0})], asked=[0, 1, 2]).mean()
        >>> up.x, up.count, up.missing
        (1.5, 2, (2,))
    """

    fields: Mapping[str, Any]
    count: int
    weight: float
    missing: tuple[int, ...]

    @staticmethod
    def of(total: Sum | None, asked: Sequence[int], missing: tuple[int, ...], where: str) -> Mean:
        """The mean that a sum of replies gives; `where` says in errors what was asked."""
        if total is None:
            raise NobodyReplied(f"none of the {len(asked)} clients replied to {where}")
        if not total.weight:
            raise RunError(f"the weights of all replies to {where} are zero")
        return Mean(total.mean(), total.count, total.weight, missing)

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"the mean has no field {name!r}; it has {', '.join(fields)}")


class Channel(Protocol):
    """What the verbs of a cohort are made of: see `fedloom.boundary`."""

    clock: Clock

    @property
    def population(self) -> int:
        """How many clients there are."""

    @property
    def busy(self) -> set[int]:
        """The clients that have submitted work under way."""

    def info(self, client: int) -> Mapping[str, Any]:
        """What a client registered."""

    def prepare(
        self,
        verb: str,
        function: Callable[..., Any],
        clients: Iterable[int],
        msg: Mapping[str, Any],
        groups: Mapping[int, int | str] | None = None,
    ) -> Call:
        """A call of a function of the method, checked."""

    def means(self, call: Call, weight: str | None) -> dict[int | str | None, Mean]:
        """The mean of the replies of each group that has some; that of all is that of `None`."""

    def carry(self, call: Call) -> Iterator[Reply]:
        """The replies, one after the other."""

    def tell(self, call: Call) -> None:
        """Has it done; nothing comes back."""

    def submit(self, call: Call) -> None:
        """Starts work."""

    def wait(self, k: int | None, seconds: float | None) -> Replies:
        """The next pieces of work that end."""

    def charge_edges(self, call: Call, reply: Reply, targets: Iterable[int]) -> float:
        """Books a peer's message once an edge; returns the seconds in which it is sent."""


class Cohort(Sequence[int]):
    """Ids of clients in ascending order; what they registered is known (`info`), their data never.

    Examples:
        >>> from fedloom.testing import Lab
        >>> from fedloom.methods.optimize.fedavg import FedAvg
        >>> cohort = Lab(FedAvg).begun().everybody
        >>> list(cohort), list(cohort.where(lambda client: client > 1))
        ([0, 1, 2, 3], [2, 3])
    """

    def __init__(self, clients: Iterable[int], boundary: Channel) -> None:
        # Everybody may be a million: a range stays one.
        self.clients: Sequence[int] = (
            clients if isinstance(clients, range) and clients.step > 0 else tuple(sorted(clients))
        )
        self.boundary = boundary

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, place: Any) -> Any:
        return self.clients[place]

    def __iter__(self) -> Iterator[int]:
        return iter(self.clients)

    def __contains__(self, client: object) -> bool:
        place = bisect_left(self.clients, client) if isinstance(client, int) else len(self)
        return place < len(self) and self.clients[place] == client

    def info(self, client: int) -> Mapping[str, Any]:
        """What a client registered: at least `n`, its number of training samples."""
        return self.boundary.info(client)

    def where(self, keep: Callable[[int], bool] | Iterable[int]) -> Cohort:
        """The clients for which `keep(client)` holds, or those of a collection of ids that are in this cohort."""
        kept = filter(keep, self.clients) if callable(keep) else filter(self.__contains__, set(map(index, keep)))
        return Cohort(kept, self.boundary)

    def split(self, parts: int) -> list[Cohort]:
        """This cohort in `parts` parts of nearly equal size, by position."""
        return [Cohort(self.clients[part::parts], self.boundary) for part in range(parts)]

    @property
    def everybody(self) -> Cohort:
        """All clients there are, whether they are in this cohort or not."""
        return Cohort(range(self.boundary.population), self.boundary)

    @property
    def idle(self) -> Cohort:
        """The clients that have no submitted work under way."""
        busy = self.boundary.busy
        return Cohort(filterfalse(busy.__contains__, self.clients), self.boundary) if busy else self

    @property
    def working(self) -> int:
        """How many clients have submitted work under way, whether they are in this cohort or not."""
        return len(self.boundary.busy)

    def clients_by_id(self, clients: Iterable[int]) -> Cohort:
        """Clients by their ids, whether they are in this cohort or not: those that were asked in an earlier round."""
        ids = set(map(index, clients))
        if beyond := sorted(ids.difference(range(self.boundary.population))):
            raise UsageError(f"there are no clients {beyond}; ids are from 0 to {self.boundary.population - 1}")
        return Cohort(ids, self.boundary)

    @property
    def now(self) -> float:
        """Seconds since the run began, by the world's clock."""
        return self.boundary.clock.now

    def mean(self, function: Callable[..., Any], weight: str | None = None, **msg: Any) -> Mean:
        """The mean of the replies, weighted by the number each sends in the field `weight` (which is not averaged).

        Replies may be partial: a field, a key of a dict or a coordinate of a `Sparse` is averaged over those who sent
        it. Memory does not grow with the cohort. Raises NobodyReplied if no reply arrives.
        """
        return self.boundary.means(self._call("mean", function, msg), weight)[None]

    def means(
        self, function: Callable[..., Any], groups: Mapping[int, int | str], weight: str | None = None, **msg: Any
    ) -> dict[int | str, Mean]:
        """A mean of the replies of each group, in one call: `groups` names that of every client of the cohort.

        A group of which no reply counts is absent; NobodyReplied if that is so of all. `field=ByGroup({group: value})`
        is an argument by group. Each mean is as `mean` of that group's clients alone would be, under a robust rule or
        masks too: a group with too few replies for these is absent as well.
        """
        found = self.boundary.means(self.boundary.prepare("means", function, self.clients, msg, groups), weight)
        return {group: mean for group, mean in found.items() if group is not None}

    def call(self, function: Callable[..., Any], **msg: Any) -> Replies:
        """Every reply, in the cohort's order."""
        return Replies(self.boundary.carry(self._call("call", function, msg)), self.clients)

    def stream(self, function: Callable[..., Any], **msg: Any) -> Iterator[Reply]:
        """As `call`, one reply at a time: only one is in memory."""
        return self.boundary.carry(self._call("stream", function, msg))

    def tell(self, function: Callable[..., Any], **msg: Any) -> None:
        """One way down: the function runs at every client that can be reached, and may change `client.state`.

        It replies nothing: a reply with fields is an error. So nothing leaves the clients, no byte comes up, and there
        is no reply to be lost, late or surplus: what a client did with the message, it keeps. A silent client
        (`dropout`, `availability`) did not hear it, and the server does not learn that. The clock stands where the
        slowest has done its work, or at the deadline if that is earlier.
        """
        self.boundary.tell(self._call("tell", function, msg))

    def work(self, function: Callable[..., Any]) -> None:
        """Work of one's own accord: the function runs at every client without having been asked by any message.

        As by `tell`, nothing comes back; and nothing goes down, so that clients out of reach work as well. Compute is
        counted, and the clock stands where the slowest has done its work, or at the deadline.
        """
        self.boundary.tell(self._call("work", function, {}))

    def submit(self, function: Callable[..., Any], **msg: Any) -> None:
        """Starts work on every client and returns at once; `wait` takes up the replies, now or in a later round."""
        if busy := self.boundary.busy.intersection(self.clients):
            raise UsageError(f"submit to clients {sorted(busy)} that still work; use cohort.idle")
        self.boundary.submit(self._call("submit", function, msg))

    def wait(self, k: int | None = None, deadline: float | None = None) -> Replies:
        """The replies of the next `k` clients that end their work (None: all), with staleness and seconds.

        `deadline`: seconds, by the world's clock, after which it waits no longer; the others work on. Where clients
        may be out of reach, `k` is a wish: fewer may be at work (NobodyReplied if nobody is).
        """
        if deadline is not None and not deadline >= 0:
            raise UsageError(f"wait(deadline={deadline}); a deadline is in seconds from now, at least 0")
        return self.boundary.wait(k, deadline)

    def exchange(
        self,
        out: Callable[..., Any],
        mix: Callable[..., Any],
        graph: Mapping[int, Iterable[int]],
        **msg: Any,
    ) -> None:
        """Peer to peer: `out` makes each client's message, `graph[i]` are the clients that i sends it to.

        Then `mix(client, inbox, **msg)` runs at every client with `inbox = {sender: fields}`. Bytes are charged to the
        edges, and the server sees no message.
        """
        call = self._call("exchange", out, msg)
        inbox: dict[int, dict[int, Any]] = {client: {} for client in self.clients}
        clock = self.boundary.clock
        began = clock.now
        for reply in self.boundary.carry(call):
            targets = sorted(set(graph.get(reply.client, ())) & inbox.keys())
            clock.reach(began + self.boundary.charge_edges(call, reply, targets))
            for target in targets:
                inbox[target][reply.client] = reply.fields
        for _ in self.boundary.carry(self._call("exchange", mix, msg | {INBOX: Each(inbox)})):
            pass

    def _call(self, verb: str, function: Callable[..., Any], msg: Mapping[str, Any]) -> Call:
        return self.boundary.prepare(verb, function, self.clients, msg)
