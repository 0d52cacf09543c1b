"""What engines with workers share: a call is cut into blocks of clients, which workers serve in any order.

How requests reach a worker is all that such an engine adds. Under `mean` a worker keeps the sums of its blocks, and
joins those that are siblings in the tree, until the call has no block left; then the joined sums travel. To repeat the
blocks of a worker that died with such sums costs time, but changes no bit.

What becomes of a block (an `Order` keeps the books of its call, the engine keeps the workers and talks to them):

    queued --dispatched--> asked --answered--> recorded --taken up--> outcomes given
     ^  ^                    |                    |
     |  |                    |                    +-- under `mean`: its sum is kept --asked for--> sums joined
     |  +-- worker crashed --+                    |                       |
     |  +-- worker crashed, and its sums with it -|-----------------------+
     +-- under `run`: another call changed what its clients remember
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Generic, TypeVar

from fedloom import encoding, message
from fedloom.calls import Call, ClientError, Outcome
from fedloom.engines.base import Engine, Summing
from fedloom.engines.orders import BLOCKS_AHEAD, Block, Order, WorkerHandle, too_many_crashes
from fedloom.engines.vectorized import at_once
from fedloom.errors import RunError
from fedloom.mean import Sum, Tree
from fedloom.message import Value
from fedloom.method import Method
from fedloom.site import Site

MIN_BLOCKS_PER_WORKER = 16  # Of a large cohort; small enough to even out, large enough to cost little.

H = TypeVar("H", bound=WorkerHandle)


class Distributed(Engine, Generic[H]):
    """Serves the clients of a call on workers, the largest first; results are bitwise those of `serial`."""

    ADVICE = "it may have printed why"  # where a worker cannot start

    def __init__(self, workers: int = 0, threads: int = 1) -> None:
        super().__init__(workers, threads)
        self.together = False  # whether a worker trains the clients of a block as one batch
        self.handles: list[H] = []
        self.orders: dict[int, Order] = {}
        self.flying: dict[int, Order] = {}  # those of them that were launched
        self.tickets = 0

    @abstractmethod
    def start_worker(self) -> H:
        """A worker that starts. What it says first, when it is ready, is no answer."""

    @abstractmethod
    def post(self, shared: bytes) -> Any:
        """Lays what all clients of a call get where workers find it; returns where that is."""

    @abstractmethod
    def send(self, handle: H, order: Order, request: dict[str, Value]) -> None:
        """Sends a request and returns at once. Should the worker be dead, `hear` will tell."""

    @abstractmethod
    def hear(self, patience: float | None = None) -> list[tuple[H, dict[str, Any] | str]]:
        """Waits until workers speak: their answers, in the order of the requests to each; a str is how one died.

        Nothing if none speaks within `patience` seconds.
        """

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Value]]) -> None:
        super().start(method, site, states)
        self.handles = []
        for _ in range(self.workers):
            self.handles.append(self.start_worker())

    def stop(self) -> None:
        self.handles = []
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
        self._dispatch(order)

    def land(self, patience: float | None = None) -> tuple[Call, Outcome] | None:
        until = None if patience is None else time.monotonic() + patience
        while self.flying:
            for order in list(self.flying.values()):
                self._dispatch(order)
                if order.answers:
                    _, answer = order.answers.popleft()
                    if not (order.pending or order.answers):
                        del self.flying[order.ticket], self.orders[order.ticket]
                    return order.call, next(self._outcomes(order, answer))
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._listen(left)
        return None

    def _level(self, clients: int) -> int:
        """Blocks of `2**level` clients, so many that they even out."""
        return max(0, (clients // (MIN_BLOCKS_PER_WORKER * len(self.handles))).bit_length() - 1)

    def _parts(self, clients: int, level: int | None = None) -> list[range]:
        """The places of a call in blocks of `2**level`, or (None) in as few as fill batches and all workers evenly."""
        if level is not None:
            return [range(first, first + (1 << level)) for first in range(0, clients, 1 << level)]
        rounds = -(-clients // (len(self.handles) * at_once(self.site)))
        parts = min(clients, rounds * len(self.handles))
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
                self._dispatch(order)
                if order.answers:
                    yield order.answers.popleft()
                elif order.pending:
                    self._listen()
                else:
                    return
        finally:
            del self.orders[order.ticket]

    def _dispatch(self, order: Order) -> None:
        for ahead in range(BLOCKS_AHEAD):
            for place, handle in enumerate(self.handles):
                if handle.ready and len(handle.work) <= ahead and (block := order.take_next(place, self.handles)):
                    self._send(handle, order, block)
        if not order.pending:
            for handle in self.handles:
                if handle in order.kept:
                    self._send(handle, order, None)

    def _send(self, handle: H, order: Order, block: Block | None) -> None:
        handle.work.append((order, block))
        order.unanswered += 1
        asked = None if block is None else order.request(block, self.states)
        self.send(handle, order, {"ticket": order.ticket, "open": list(self.orders), "block": asked})

    def _listen(self, patience: float | None = None) -> None:
        """Records what workers have to say. The call that waits may hear answers to another."""
        for handle, answer in self.hear(patience):
            if isinstance(answer, str):
                self._restart_worker(handle, answer)
            elif not handle.ready:
                handle.ready = True
            else:
                order, block = handle.work.popleft()
                order.unanswered -= 1
                if order.ticket in self.orders:  # else its call was given up
                    order.record(handle, block, answer)

    def _restart_worker(self, handle: H, how: str) -> None:
        """Starts another worker for one that died, and puts its work in front again."""
        if not handle.ready:
            raise RunError(f"a worker could not start ({how}); {self.ADVICE}")
        for order, block in handle.work:
            if order.count_crash(block) and order.ticket in self.orders:
                raise too_many_crashes(block, how)
        for order in self.orders.values():
            order.requeue_kept(handle)
        for order, block in reversed(handle.work):
            order.requeue(block)
        self.handles[self.handles.index(handle)] = self.start_worker()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
