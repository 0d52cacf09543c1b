"""A call under way on workers: which block is next, what is asked of its worker, what an answer or a crash means."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.calls import Call
from fedloom.errors import RunError
from fedloom.message import Value

BLOCKS_AHEAD = 2  # A worker has so many at hand, so that it never waits for the next.
MAX_CRASHES_PER_BLOCK = 3  # The run gives up when so many workers died over one block.


@dataclass(frozen=True, eq=False)
class Block:
    """Some clients of a call, at neighbouring places of its cohort, that one worker serves in order."""

    index: int  # its number among the blocks of the call
    places: Mapping[int, int]  # client -> place
    span: range = range(0)  # those places of the cohort and, between them, the ones of clients that are absent
    level: int | None = None  # the span is a node of the tree: `2**level` places from `index * 2**level` on


@dataclass(eq=False, kw_only=True)
class WorkerHandle:
    """A worker as its engine sees it."""

    ready: bool = False  # it has said that it is
    work: deque[tuple[Order, Block | None]] = field(default_factory=deque)  # oldest first; None asks for a kept sum


@dataclass(eq=False)
class Order:
    """A call under way."""

    ticket: int
    call: Call
    spot: Any  # where its shared part lies
    reduce: tuple[str | None, Container[int]] | None  # under `mean`: the field of the weight, and whose reply is lost
    queue: deque[Block]  # not yet dispatched
    blocks: int  # of the call, empty ones included
    first: int = 0  # index of the block whose outcomes are next
    unanswered: int = 0  # requests
    answers: deque[tuple[Block | None, dict[str, Any]]] = field(default_factory=deque)  # recorded, not yet taken up
    answered: set[int] = field(default_factory=set)  # indices of blocks
    kept: dict[WorkerHandle, list[Block]] = field(default_factory=dict)  # blocks whose sums are in which workers
    stale: set[int] = field(default_factory=set)  # clients whose state another call changed behind this one's back
    crashes: Counter[Block | None] = field(default_factory=Counter)  # of workers over a block

    @property
    def pending(self) -> bool:
        """Whether blocks or kept sums are still to be answered."""
        return bool(self.queue or self.unanswered)

    def take_next(self, place: int, handles: Sequence[WorkerHandle]) -> Block | None:
        """The next block for the worker at this place among the workers, if it is to have one; it leaves the queue."""
        if not self.queue:
            return None
        work, block = handles[place].work, self.queue[0]
        if self.reduce is None:
            # A stream holds no more replies than its workers have at hand, however long the first may take.
            if self.call.verb == "stream" and block.index >= self.first + BLOCKS_AHEAD * len(handles):
                return None
        else:
            # Neighbours go to one worker, as long as it has not run out of its own: siblings then meet in it.
            own = (block for block in self.queue if block.index * len(handles) // self.blocks == place)
            block = next(own, block)
        # A worker that dies may take answers along that it had not yet sent: what it had at hand is repeated piece by
        # piece, so that whoever kills workers is known.
        if work and (self.crashes[block] or any(its.crashes[piece] for its, piece in work)):
            return None
        self.queue.remove(block)
        return block

    def request(self, block: Block, states: Mapping[int, dict[str, Value]]) -> dict[str, Value]:
        """What is asked of a block's worker, who gets the clients' `states`; not what all clients of the call get."""
        call, clients = self.call, block.places.keys()
        # Only blocks whose clients remembered nothing are ever repeated after their outcomes were committed.
        known = () if block.index in self.answered and self.reduce else states
        remembered: dict[Any, Value] = {client: dict(states[client]) for client in clients if client in known}
        self.stale.difference_update(clients)
        asked: dict[str, Value] = {
            "call": [call.verb, call.function, call.kind, call.round, call.nth, call.pace],
            "places": dict(block.places),
            "own": {client: dict(call.own[client]) for client in clients if client in call.own},
            "states": remembered,
            "reduce": None,
        }
        if self.reduce is not None:
            weight, lost = self.reduce
            # States travel with each block, and outweigh its sum: there is little to gain in keeping that.
            asked["reduce"] = {
                "weight": weight,
                "lost": [client for client in clients if client in lost],
                "span": [block.span.start, block.span.stop],
                "keep": not remembered and block.level is not None,
            }
        return asked

    def record(self, handle: WorkerHandle, block: Block | None, answer: dict[str, Any]) -> None:
        """Takes a worker's answer for a block, or (None) one of the sums that it kept."""
        self.answers.append((block, answer))
        if answer["error"] is not None:
            return
        if block is None:
            level, index, _ = answer["nodes"][0]
            left = [kept for kept in self.kept.pop(handle) if kept.index >> (level - kept.level) != index]
            if left:
                self.kept[handle] = left
            return
        if block.index in self.answered and self.reduce:
            answer["outcomes"] = []
        self.answered.add(block.index)
        if self.reduce and not answer["nodes"]:
            self.kept.setdefault(handle, []).append(block)

    def count_crash(self, block: Block | None) -> bool:
        """Counts a worker that died over a block, or over a sum that it kept; whether there were too many."""
        self.crashes[block] += 1
        return self.crashes[block] >= MAX_CRASHES_PER_BLOCK

    def requeue(self, block: Block | None) -> None:
        """Puts in front what was asked of a worker that died; its kept sums are made again by `requeue_kept`."""
        self.unanswered -= 1
        if block is not None:
            self.queue.appendleft(block)

    def requeue_kept(self, handle: WorkerHandle) -> None:
        """Puts in front the blocks whose sums died with a worker."""
        self.queue.extendleft(self.kept.pop(handle, ()))


def too_many_crashes(block: Block | None, how: str) -> RunError:
    """The error for a block that workers do not survive."""
    clients = ", ".join(map(str, list(block.places)[:5])) if block else "none, but of a sum of replies,"
    return RunError(
        f"the worker of client {clients} died {MAX_CRASHES_PER_BLOCK} times ({how}); "
        "if memory ran out, take fewer --workers or a smaller batch"
    )
