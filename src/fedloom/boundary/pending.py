"""Work that was submitted and not yet waited for: an event queue over the world's clock.

Virtually, a job begins when it is submitted and ends by its client's speed, the steps it really took and the bytes that
travelled. It is carried out when somebody waits: one engine call for each `submit`, so that engines with workers gain,
and what it made of the client's state is kept when it ends. Jobs that end at one moment come in the order in which they
were submitted. In real time a job is the engine's from the start, and its end is when the engine says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

import torch

from fedloom import message
from fedloom.boundary.arrivals import Sent
from fedloom.calls import Call, Outcome
from fedloom.cohort import Replies, Reply
from fedloom.errors import NobodyReplied, UsageError
from fedloom.world import Trip

if TYPE_CHECKING:
    from fedloom.boundary.arrivals import Arrivals


OUTCOME = tuple(part.name for part in fields(Outcome))


@dataclass(eq=False, slots=True)
class Submission:
    """What one `submit` started. `tickets`: by client, those not carried out yet; tickets number all jobs of a run."""

    call: Call
    began: float
    sent: Sent
    lost: set[int]
    tickets: dict[int, int]
    launched: bool = False  # in real time: the engine has it


@dataclass(eq=False, slots=True)
class Job:
    """A client's work that has an end: what came of it (nothing if it was silent), and how long that took."""

    call: Call  # without its message, which nobody needs any more
    client: int
    began: float
    trip: Trip
    fate: str  # arrived, lost, silent or broken
    outcomes: list[Outcome] = field(default_factory=list)  # more than one: duplicates


class PendingWork:
    """All work under way."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals
        self.busy: set[int] = set()
        self.tickets = 0
        self.waiting: list[Submission] = []  # submitted and not carried out
        self.queue: list[tuple[float, int, Job]] = []  # by the moment of its end, then by ticket

    def __len__(self) -> int:
        return len(self.busy)

    def submit(self, call: Call) -> None:
        """Starts work on every client of a call now."""
        world, clock = self.arrivals.world, self.arrivals.clock
        _, sent, awake, lost, now = self.arrivals.ask(call)
        tickets = dict(zip(call.clients, range(self.tickets, self.tickets + len(call.clients)), strict=True))
        self.tickets += len(tickets)
        self.busy.update(tickets)
        if len(awake) < len(tickets):
            # Who does not react is found out as soon as a message could have gone to and fro.
            trip, slim, working = Trip(world.latency, 0.0, world.latency), _slim(call), set(awake)
            for client in [client for client in tickets if client not in working]:
                self._end(tickets.pop(client), Job(slim, client, now, trip, "silent"))
        if tickets:
            self.waiting.append(Submission(call, now, sent, lost, tickets))
        if clock.real:
            self._launch()

    def wait(self, k: int | None, seconds: float | None) -> Replies:
        """The next `k` jobs that end (None: all), or those that do within so many seconds."""
        clock = self.arrivals.clock
        if k is not None and k > len(self):
            if self.arrivals.world.reachable is None:
                raise UsageError(f"wait({k}) with only {len(self)} clients at work; submit first")
            if not len(self):
                round = self.arrivals.books.round
                raise NobodyReplied(f"none of the clients that can be reached is at work in round {round}")
        wanted = len(self) if k is None else min(k, len(self))
        until = None if seconds is None else clock.now + seconds
        replies: list[Reply] = []
        asked: list[int] = []
        if clock.real:
            self._launch()
        elif wanted:
            self._carry_out()
        while len(asked) < wanted and (job := self._next(until)) is not None:
            asked.append(job.client)
            reply = self._arrive(job)
            if reply is not None:
                replies.append(reply)
        if until is not None and len(asked) < wanted:
            clock.reach(until)
        return Replies(replies, asked)

    def _next(self, until: float | None) -> Job | None:
        """The job that ends next, and the clock with it; None if that is not before a moment."""
        clock = self.arrivals.clock
        if clock.real and not self.queue:
            left = None if until is None else max(0.0, until - clock.now)
            landed = self.arrivals.engine.land(left)
            if landed is None:
                return None
            self._file(*landed)
        if until is not None and self.queue[0][0] > until and not clock.real:
            return None
        moment, _, job = heappop(self.queue)
        clock.reach(moment)
        return job

    def _arrive(self, job: Job) -> Reply | None:
        """Books a job that has ended; gives its reply if it counts, and keeps what its client remembers with it."""
        self.busy.discard(job.client)
        good = self.arrivals.book_arrival(job.call, job.client, job.began, job.trip, job.fate, job.outcomes)
        if good is None:
            return None
        self.arrivals.keep(job.call, good)
        return self.arrivals.reply(job.call, good, job.trip)

    def _launch(self) -> None:
        for submission in self.waiting:
            if not submission.launched:
                submission.launched = True
                self.arrivals.engine.launch(submission.call, list(submission.tickets))

    def _file(self, call: Call, outcome: Outcome) -> None:
        """Takes an outcome that came in real time."""
        submission = next(submission for submission in self.waiting if submission.call is call)
        ticket = submission.tickets.pop(outcome.client)
        if not submission.tickets:
            self.waiting.remove(submission)
        trip = Trip(0.0, self.arrivals.clock.now - submission.began, 0.0)
        fate = "lost" if outcome.client in submission.lost else "arrived"
        outcomes = list(self.arrivals.apply_stages(call, [outcome]))
        self._end(ticket, Job(_slim(call), outcome.client, submission.began, trip, fate, outcomes))

    def _carry_out(self) -> None:
        """Has all work done that was submitted; when each job ends is known then."""
        waiting, self.waiting = self.waiting, []
        arrivals = self.arrivals
        for submission in waiting:
            call, outcomes = submission.call, defaultdict[int, list[Outcome]](list)
            for outcome in arrivals.apply_stages(call, arrivals.engine.run(call, list(submission.tickets))):
                outcomes[outcome.client].append(outcome)
            slim = _slim(call)
            for client, ticket in submission.tickets.items():
                self._end(ticket, self._job(submission, slim, client, outcomes[client]))

    def _job(self, submission: Submission, slim: Call, client: int, outcomes: list[Outcome]) -> Job:
        world = self.arrivals.world
        steps, up = (outcomes[0].steps, sum(outcomes[0].sizes.values())) if outcomes else (0, 0)
        trip = world.trip(client, submission.sent.to(client), steps, up)
        fate = "lost" if client in submission.lost or not outcomes else "arrived"
        if world.interrupts and submission.call.kind == "train":
            broken = world.broken(client, submission.began, trip)
            if broken is not None:
                trip, fate = broken, "broken"
        return Job(slim, client, submission.began, trip, fate, outcomes)

    def _end(self, ticket: int, job: Job) -> None:
        heappush(self.queue, (job.began + job.trip.seconds, ticket, job))

    def outcomes(self) -> Iterator[Outcome]:
        """What came of work that has ended and was not waited for yet."""
        return (outcome for _, _, job in self.queue for outcome in job.outcomes)

    def frames(self) -> Iterator[dict[str, Any]]:
        """Everything as messages: one for each submission, whose message is in it once, and one for each ended job."""
        for submission in self.waiting:
            yield {
                "call": _plain(submission.call),
                "began": submission.began,
                "sent": [submission.sent.alike, submission.sent.own],
                "lost": sorted(submission.lost),
                "tickets": submission.tickets,
            }
        for _, ticket, job in sorted(self.queue, key=lambda entry: entry[1]):
            yield {
                "call": _plain(job.call),
                "client": job.client,
                "ticket": ticket,
                "began": job.began,
                "trip": list(job.trip),
                "fate": job.fate,
                "outcomes": [{name: getattr(outcome, name) for name in OUTCOME} for outcome in job.outcomes],
            }

    def restore(self, frames: Iterable[Mapping[str, Any]], device: torch.device) -> None:
        """The work of a checkpoint."""
        for frame in frames:
            held: dict[str, Any] = message.moved(dict(frame), device)
            call = Call(**held["call"] | {"clients": tuple(held["call"]["clients"])})
            if "tickets" in held:
                alike, own = held["sent"]
                submission = Submission(call, held["began"], Sent(alike, own), set(held["lost"]), held["tickets"])
                self.waiting.append(submission)
                self.busy.update(submission.tickets)
            else:
                outcomes = [Outcome(**outcome) for outcome in held["outcomes"]]
                job = Job(call, held["client"], held["began"], Trip(*held["trip"]), held["fate"], outcomes)
                self.queue.append((job.began + job.trip.seconds, held["ticket"], job))
                self.busy.add(job.client)
        heapify(self.queue)


def _slim(call: Call) -> Call:
    return replace(call, clients=(), shared={}, own={})


def _plain(call: Call) -> dict[str, Any]:
    return vars(call) | {"shared": dict(call.shared), "own": {k: dict(v) for k, v in call.own.items()}}
