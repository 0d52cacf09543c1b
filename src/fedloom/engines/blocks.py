"""What engines with workers share: a call is cut into blocks of clients, which workers serve in any order.

How requests reach a worker is all that such an engine adds. Under `mean` a worker keeps the sums of its blocks, and
joins those that are siblings in the tree, until the call has no block left; then the joined sums travel. To repeat the
blocks of a worker that died with such sums costs time, but changes no bit.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fedloom import encoding, message
from fedloom.calls import Call, ClientError, Outcome
from fedloom.engines.base import Engine, Summing
from fedloom.engines.vectorized import at_once
from fedloom.errors import RunError
from fedloom.mean import Sum, Tree
from fedloom.message import Value
from fedloom.method import Method
from fedloom.site import Site

AHEAD = 2  # blocks a worker has at hand, so that it never waits for the next
BLOCKS = 16  # a worker, at least, where the cohort is large: small enough to even out, large enough to cost little
DEATHS = 3  # of workers over one block, until the run gives up


@dataclass(frozen=True, eq=False)
class Block:
    """Some clients of a call, at neighbouring places of its cohort, that one worker serves in order."""

    index: int  # its number among the blocks of the call
    places: Mapping[int, int]  # client -> place
    span: range = range(0)  # those places of the cohort and, between them, the ones of clients that are absent
    level: int | None = None  # the span is a node of the tree: `2**level` places from `index * 2**level` on


@dataclass(eq=False, kw_only=True)
class Hand:
    """A worker as its engine sees it."""

    ready: bool = False  # it has said that it is
    work: deque[tuple[Order, Block | None]] = field(default_factory=deque)  # oldest first; None asks for a kept sum


H = TypeVar("H", bound=Hand)


@dataclass(eq=False)
class Order:
    """A call under way."""

    ticket: int
    call: Call
    spot: Any  # where its shared part lies
    reduce: tuple[str | None, Container[int]] | None  # under `mean`: the field of the weight, and whose reply is lost
    queue: deque[Block]  # not yet handed out
    blocks: int  # of the call, empty ones included
    first: int = 0  # index of the block whose outcomes are next
    out: int = 0  # requests not yet answered
    answers: deque[tuple[Block | None, dict[str, Any]]] = field(default_factory=deque)  # heard, not yet taken up
    heard: set[int] = field(default_factory=set)  # indices of blocks that were answered
    kept: dict[Hand, list[Block]] = field(default_factory=dict)  # blocks whose sums are in which workers
    stale: set[int] = field(default_factory=set)  # clients whose state another call changed behind this one's back
    deaths: Counter[Block | None] = field(default_factory=Counter)  # of workers over a block


class Distributed(Engine, Generic[H]):
    """Serves the clients of a call on workers, the largest first; results are bitwise those of `serial`."""

    ADVICE = "it may have printed why"  # where a worker cannot start

    def __init__(self, workers: int = 0, threads: int = 1) -> None:
        super().__init__(workers, threads)
        self.together = False  # whether a worker trains the clients of a block as one batch
        self.hands: list[H] = []
        self.orders: dict[int, Order] = {}
        self.flying: dict[int, Order] = {}  # those of them that were launched
        self.tickets = 0

    @abstractmethod
    def hire(self) -> H:
        """A worker that starts. What it says first, when it is ready, is no answer."""

    @abstractmethod
    def post(self, shared: bytes) -> Any:
        """Lays what all clients of a call get where workers find it; returns where that is."""

    @abstractmethod
    def send(self, hand: H, order: Order, request: dict[str, Value]) -> None:
        """Sends a request and returns at once. Should the worker be dead, `hear` will tell."""

    @abstractmethod
    def hear(self, patience: float | None = None) -> list[tuple[H, dict[str, Any] | str]]:
        """Waits until workers speak: their answers, in the order of the requests to each; a str is how one died.

        Nothing if none speaks within `patience` seconds.
        """

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Value]]) -> None:
        super().start(method, site, states)
        self.hands = []
        for _ in range(self.workers):
            self.hands.append(self.hire())

    def stop(self) -> None:
        self.hands = []
        self.orders.clear()
        self.flying.clear()

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        asked = list(clients)
        parts = self._parts(len(asked), None if self.together and call.verb != "stream" else 0)
        places = [dict(zip(asked[part.start : part.stop], part, strict=True)) for part in parts]
        order = self._begin(call, [Block(index, there) for index, there in enumerate(places)])
        done: dict[int, tuple[Block, dict[str, Any]]] = {}
        for block, answer in self._answers(order):
            assert block is not None
            done[block.index] = (block, answer)
            while order.first in done:
                block, answer = done.pop(order.first)
                if not order.stale.isdisjoint(block.places):
                    order.queue.appendleft(block)
                    break
                yield from self._outcomes(order, answer)
                order.first += 1

    def reduce(self, call: Call, clients: Sequence[int], lost: Container[int], weight: str | None) -> Summing:
        return Summing(self._reduced(call, clients, lost, weight))

    def _reduced(
        self, call: Call, clients: Sequence[int], lost: Container[int], weight: str | None
    ) -> Generator[Outcome, None, Sum | None]:
        working, tree = set(clients), Tree()
        level = None if self.together else self._level(len(call.clients))
        blocks = []
        for index, span in enumerate(self._parts(len(call.clients), level)):
            some = zip(call.clients[span.start : span.stop], span, strict=False)  # the last span may be longer
            places = {client: place for client, place in some if client in working}
            if places:
                blocks.append(Block(index, places, span, level))
            else:
                for place in span:
                    tree.put(0, place, None)
        order = self._begin(call, blocks, (weight, lost))
        for _, answer in self._answers(order):
            yield from self._outcomes(order, answer)
            for level, index, total in answer["nodes"]:
                tree.put(level, index, None if total is None else Sum.unpacked(total, self.site.device))
        return tree.total()

    def keep(self, client: int, state: dict[str, Value] | None) -> None:
        super().keep(client, state)
        if state is not None:
            for order in self.orders.values():
                order.stale.add(client)

    def launch(self, call: Call, clients: Iterable[int]) -> None:
        order = self._begin(call, [Block(place, {client: place}) for place, client in enumerate(clients)])
        self.orders[order.ticket] = self.flying[order.ticket] = order
        self._hand_out(order)

    def land(self, patience: float | None = None) -> tuple[Call, Outcome] | None:
        until = None if patience is None else time.monotonic() + patience
        while self.flying:
            for order in list(self.flying.values()):
                self._hand_out(order)
                if order.answers:
                    _, answer = order.answers.popleft()
                    if not (order.queue or order.out or order.answers):
                        del self.flying[order.ticket], self.orders[order.ticket]
                    return order.call, next(self._outcomes(order, answer))
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._listen(left)
        return None

    def _level(self, clients: int) -> int:
        """Blocks of `2**level` clients, so many that they even out."""
        return max(0, (clients // (BLOCKS * len(self.hands))).bit_length() - 1)

    def _parts(self, clients: int, level: int | None = None) -> list[range]:
        """The places of a call in blocks of `2**level`, or (None) in as few as fill batches and all workers evenly."""
        if level is not None:
            return [range(first, first + (1 << level)) for first in range(0, clients, 1 << level)]
        rounds = -(-clients // (len(self.hands) * at_once(self.site)))
        parts = min(clients, rounds * len(self.hands))
        return [range(clients * k // parts, clients * (k + 1) // parts) for k in range(parts)]

    def _outcomes(self, order: Order, answer: Mapping[str, Any]) -> Iterator[Outcome]:
        if answer["error"] is not None:
            raise (ClientError if answer["client"] else RunError)(answer["error"])
        for packed in answer["outcomes"]:
            outcome = Outcome(**message.moved(dict(packed), self.site.device))
            if self.commit(order.call, outcome):
                for other in self.orders.values():
                    if other is not order:
                        other.stale.add(outcome.client)
            yield outcome

    def _begin(self, call: Call, blocks: list[Block], reduce: tuple[str | None, Container[int]] | None = None) -> Order:
        """An order; others may still be under way."""
        if call.verb != "stream":
            n = self.site.task.info
            blocks = sorted(blocks, key=lambda block: -sum(n(client).get("n", 1) for client in block.places))
        self.tickets += 1
        many = max((block.index for block in blocks), default=0) + 1
        return Order(self.tickets, call, self.post(encoding.encode(call.shared)), reduce, deque(blocks), many)

    def _answers(self, order: Order) -> Iterator[tuple[Block | None, dict[str, Any]]]:
        """The answers as they come: one for each block, and those with sums that workers kept."""
        self.orders[order.ticket] = order
        try:
            while True:
                self._hand_out(order)
                if order.answers:
                    yield order.answers.popleft()
                elif order.queue or order.out:
                    self._listen()
                else:
                    return
        finally:
            del self.orders[order.ticket]

    def _hand_out(self, order: Order) -> None:
        for ahead in range(AHEAD):
            for place, hand in enumerate(self.hands):
                if hand.ready and len(hand.work) <= ahead and (block := self._next(order, place)):
                    self._send(hand, order, block)
        if not order.queue and not order.out:
            for hand in self.hands:
                if hand in order.kept:
                    self._send(hand, order, None)

    def _next(self, order: Order, place: int) -> Block | None:
        """The next block for the worker at this place among the workers, if it is to have one."""
        if not order.queue:
            return None
        work, block = self.hands[place].work, order.queue[0]
        if order.reduce is None:
            # A stream holds no more replies than its workers have at hand, however long the first may take.
            if order.call.verb == "stream" and block.index >= order.first + AHEAD * len(self.hands):
                return None
        else:
            # Neighbours go to one worker, as long as it has not run out of its own: siblings then meet in it.
            own = (block for block in order.queue if block.index * len(self.hands) // order.blocks == place)
            block = next(own, block)
        # A worker that dies may take answers along that it had not yet sent: what it had at hand is repeated piece by
        # piece, so that whoever kills workers is known.
        if work and (order.deaths[block] or any(its.deaths[piece] for its, piece in work)):
            return None
        order.queue.remove(block)
        return block

    def _send(self, hand: H, order: Order, block: Block | None) -> None:
        hand.work.append((order, block))
        order.out += 1
        asked = None if block is None else self._asked(order, block)
        self.send(hand, order, {"ticket": order.ticket, "open": list(self.orders), "block": asked})

    def _asked(self, order: Order, block: Block) -> dict[str, Value]:
        """The request for a block; what all clients of the call get is not in it."""
        call, clients = order.call, block.places.keys()
        # Only blocks whose clients remembered nothing are ever repeated after their outcomes were committed.
        known = () if block.index in order.heard and order.reduce else self.states
        states: dict[Any, Value] = {client: dict(self.states[client]) for client in clients if client in known}
        order.stale.difference_update(clients)
        asked: dict[str, Value] = {
            "call": [call.verb, call.function, call.kind, call.round, call.nth],
            "places": dict(block.places),
            "own": {client: dict(call.own[client]) for client in clients if client in call.own},
            "states": states,
            "reduce": None,
        }
        if order.reduce is not None:
            weight, lost = order.reduce
            # States travel with each block, and outweigh its sum: there is little to gain in keeping that.
            asked["reduce"] = {
                "weight": weight,
                "lost": [client for client in clients if client in lost],
                "span": [block.span.start, block.span.stop],
                "keep": not states and block.level is not None,
            }
        return asked

    def _listen(self, patience: float | None = None) -> None:
        """Files what workers have to say. The call that waits may hear answers to another."""
        for hand, answer in self.hear(patience):
            if isinstance(answer, str):
                self._replace(hand, answer)
            elif not hand.ready:
                hand.ready = True
            else:
                order, block = hand.work.popleft()
                order.out -= 1
                if order.ticket in self.orders:  # else its call was given up
                    self._file(hand, order, block, answer)

    def _file(self, hand: Hand, order: Order, block: Block | None, answer: dict[str, Any]) -> None:
        order.answers.append((block, answer))
        if answer["error"] is not None:
            return
        if block is None:
            level, index, _ = answer["nodes"][0]
            left = [kept for kept in order.kept.pop(hand) if kept.index >> (level - kept.level) != index]
            if left:
                order.kept[hand] = left
            return
        if block.index in order.heard and order.reduce:
            answer["outcomes"] = []
        order.heard.add(block.index)
        if order.reduce and not answer["nodes"]:
            order.kept.setdefault(hand, []).append(block)

    def _replace(self, hand: H, how: str) -> None:
        """Hires another worker for one that died, and puts its work in front again."""
        if not hand.ready:
            raise RunError(f"a worker could not start ({how}); {self.ADVICE}")
        for order, block in hand.work:
            self._mourn(order, block, how)
        for order in self.orders.values():
            order.queue.extendleft(order.kept.pop(hand, ()))
        for order, block in reversed(hand.work):
            order.out -= 1
            if block is not None:
                order.queue.appendleft(block)
        self.hands[self.hands.index(hand)] = self.hire()

    def _mourn(self, order: Order, block: Block | None, how: str) -> None:
        """Counts a death over a block; raises RunError when there are too many."""
        order.deaths[block] += 1
        if order.ticket in self.orders and order.deaths[block] >= DEATHS:
            clients = ", ".join(map(str, list(block.places)[:5])) if block else "none, but of a sum of replies,"
            raise RunError(
                f"the worker of client {clients} died {DEATHS} times ({how}); "
                "if memory ran out, take fewer --workers or a smaller batch"
            )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
