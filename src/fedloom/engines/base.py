"""What every engine is: it carries the call of a client function to where the clients live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedloom.calls import Call, Outcome
from fedloom.engines import heap

if TYPE_CHECKING:
    from fedloom.mean import Sum
    from fedloom.message import Value
    from fedloom.method import Method
    from fedloom.runs.spec import Spec
    from fedloom.site import Site
    from fedloom.task import Task


@dataclass(eq=False)
class Summing:
    """Outcomes without their replies, which are summed where they are made; `total` is there once all have come.

    The sum runs along the tree over the places of the call's clients, those of absent clients being empty.
    """

    outcomes: Generator[Outcome, None, Sum | None]
    total: Sum | None = None

    def __iter__(self) -> Iterator[Outcome]:
        self.total = yield from self.outcomes


class Engine(ABC):
    """Carries calls to clients. Every engine gives bitwise the same results."""

    keeps_states: ClassVar[bool] = True  # what clients remember is in `states`; False: there are its names only
    sees_replies: ClassVar[bool] = False  # each reply comes to the server by itself, whatever verb has asked for it

    def __init__(self, workers: int = 0, threads: int = 1) -> None:
        self.workers = workers
        self.threads = threads

    def at_server(self, spec: Spec, task: Task) -> Task:
        """What the server has of a run's problem, before anything is made of it: all of it, where clients are here."""
        return task

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Value]]) -> None:
        """Before the first call: the method, the site of the server's process, and the clients' states."""
        self.method = method
        self.site = site
        self.states = states
        self.launched: deque[tuple[Call, int]] = deque()
        heap.keep()

    @abstractmethod
    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        """The outcomes, in the order of `clients`; a client's state is committed before its outcome is given.

        Not so if the call is `held`: then `keep` does that.
        """

    def reduce(self, call: Call, clients: Sequence[int], lost: Container[int], weight: str | None) -> Summing | None:
        """The outcomes of `clients` with the sum of the replies of all that are not `lost`, made where they are.

        None where this engine has replies at the server only, one by one.
        """
        return None

    def commit(self, call: Call, outcome: Outcome) -> bool:
        """Keeps what a client remembers from now on, if that is new; evaluation leaves no trace."""
        if outcome.state is None or call.kind == "evaluate" or call.held:
            return False
        self.states[outcome.client] = outcome.state
        return True

    def keep(self, client: int, state: dict[str, Value] | None) -> None:
        """Commits what a client remembers after a `held` call, its reply having counted; None: as before."""
        if state is not None:
            self.states[client] = state

    def launch(self, call: Call, clients: Iterable[int]) -> None:
        """Starts work whose outcomes `land` gives one by one as they come, in real time; the call is `held`.

        An engine without workers does the work in `land`, in the order in which it was launched.
        """
        self.launched.extend((call, client) for client in clients)

    def land(self, patience: float | None = None) -> tuple[Call, Outcome] | None:
        """The next outcome of launched work; None if none is under way, or none came within `patience` seconds."""
        if not self.launched:
            return None
        call, client = self.launched.popleft()
        return call, next(iter(self.run(call, [client])))

    def saving(self, round: int) -> None:
        """A checkpoint of this round is about to be written."""

    def saved(self, round: int, pending: Iterable[Outcome]) -> None:
        """A checkpoint of this round is on the disk; `pending` outcomes are in it, and may still come to count."""

    def judged(self, which: Iterable[str], round: int) -> None:
        """In this round was judged what is the `chosen`, or the `last`, from now on."""

    def manifest(self) -> Mapping[str, Any]:
        """What the run's manifest says of where its clients were."""
        return {}

    def stop(self) -> None:
        """After the last call, also when the run failed."""
