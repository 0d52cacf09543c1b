"""What may happen to messages on their way: each thing is one `Stage`, which says at which hooks it acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fedloom.calls import Layer

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call, Outcome
    from fedloom.cohort import Mean
    from fedloom.mean import Sum
    from fedloom.method import Planned
    from fedloom.node import Server
    from fedloom.site import Site
    from fedloom.task import Task

Groups = Iterator[tuple[Sequence[int], Mapping[str, int]]]  # clients that get as many bytes, and the bytes by field


@dataclass
class Gathered:
    """The replies to a `mean` that the server has one by one."""

    weighted: bool  # whether the clients say how much they count
    parts: dict[int, tuple[Mapping[str, Any], float]] = field(default_factory=dict)  # client -> fields, weight
    worked: set[int] = field(default_factory=set)  # who has a reply, whether it arrived or not


Combined = tuple["Sum | None", Sequence[int]]  # a sum of replies, and whose are in it


class Stage(Layer):
    """One thing that may happen to messages; every hook does nothing until a stage says what.

    A stage is frozen. What it keeps from round to round are messages in `books.memory`, under its own name, and so in
    checkpoints; numbers for the round's record go into `books.notes`. Where it acts at the clients, it is a `Layer`.
    Hooks that get a call, and those from `weighted_by` to `mean`, act in calls of its `kinds` only.
    """

    setting: ClassVar[str] = ""  # that asks for it
    by_rounds: bool = False  # it depends on how many rounds the run has

    # -- before the run

    def at_clients(self) -> Sequence[Layer]:
        """What of it wraps the client functions: it itself, where it says how."""
        cls = type(self)
        return [self] if (cls.around, cls.arrive, cls.receive) != (Stage.around, Stage.arrive, Stage.receive) else []

    def check_network(self, site: Site) -> None:
        """Raises UsageError for a network that it cannot deal with."""

    def on(self, task: Task) -> Stage | None:
        """The same on a small problem, where a method is tried before its run; None: there is nothing to try."""
        return None

    def after_rehearsal(self, books: Books, whole: bool) -> Stage:
        """The same, that knows what the books say of such a trial, and whether it came to its end.

        Raises UsageError if that rules out the run.
        """
        return self

    def check_call(self, call: Call | Planned) -> None:
        """Raises UsageError for a call, of any kind, that does not go with it."""

    # -- in a call

    def begin(self, books: Books) -> None:
        """A new round, or traffic of another kind in it."""

    def hidden_fields(self, books: Books, clients: Sequence[int]) -> Mapping[str, Any]:
        """Fields that go along with a message, for the layers: their names begin with an underscore."""
        return {}

    def message_sizes(self, books: Books, call: Call, inner: Callable[[], Groups]) -> Groups:
        """How many bytes a message takes to whom; `inner` gives what it takes without this stage."""
        return inner()

    def outcomes(self, books: Books, call: Call, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """The outcomes as they reach the server, which turns away those that have a `fault`: with all in view."""
        return outcomes

    def call_ended(self, books: Books, call: Call, client: int, arrived: bool) -> None:
        """The fate of a client's part in a call is known."""

    def books_replies(self, call: Call) -> bool:
        """Whether it books the bytes of a call's replies itself."""
        return False

    def reply_seen(self, books: Books, call: Call, outcome: Outcome) -> None:
        """A reply has come out of its client."""

    def reported_verb(self, call: Call) -> str:
        """The verb that says what the server learns in a call."""
        return call.verb

    # -- in a mean

    def weighted_by(self, call: Call, weight: str | None) -> str | None:
        """The field by which a mean is weighted."""
        return weight

    def combine(self, books: Books, call: Call, replies: Gathered, inner: Callable[[], Combined]) -> Combined:
        """What the server makes of the replies, at least one, and which it took; `inner` gives their plain sum."""
        return inner()

    def total(self, books: Books, call: Call, total: Sum | None) -> Sum | None:
        """The sum of a call's replies, before it is divided; None: there was none."""
        return total

    def mean(self, books: Books, call: Call, mean: Mean) -> Mean:
        """A mean as the method gets it."""
        return mean

    # -- in the run

    def observe(self, books: Books, server: Server, observe: Callable[[], Any]) -> Any:
        """What a method's `observe` gives."""
        return observe()

    def is_honest(self, client: int) -> bool:
        """Whether a client is one that personal measures count."""
        return True

    def attacks(self, client: int, round: int) -> bool:
        """Whether it makes a client malicious in a round."""
        return False

    def measure(self, server: Server) -> Mapping[str, float | None]:
        """Measures of the global model for the record."""
        return {}

    def round_row(self, books: Books, server: Server) -> Mapping[str, float | None]:
        """Numbers for the record of a round that has ended."""
        return {}

    def stop_reason(self, books: Books) -> str | None:
        """Why the run ends before its next round, if it does."""
        return None

    def manifest(self, books: Books) -> Mapping[str, Any]:
        """What the manifest says of it."""
        return {}

    def final_manifest(self, books: Books, server: Server) -> Mapping[str, Any]:
        """What the manifest says of the model of a run that is over."""
        return {}
