"""What one kind of attacker is: a share of the clients, its options, and what it does."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex

from fedloom.boundary.attack.numbers import Sent
from fedloom.calls import Fields
from fedloom.errors import UsageError
from fedloom.members import offered
from fedloom.ranges import Positive, settle
from fedloom.user_files import USERS, class_in, module_at

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.node import Client
    from fedloom.site import Site
    from fedloom.task import Task
    from fedloom.vector import Vector

Inner = Callable[[], Fields]
Training = Callable[..., "tuple[Vector, int]"]


@dataclass(frozen=True)
class Part:
    """One kind of attacker. Fields are options, as in `sign_flip:0.2,scale=3`; those in `hidden` are none.

    In rounds before `from` and after `until` its clients are honest.
    """

    share: float  # of the clients that are such, below 1; from 1 on their number
    from_: Positive[int] = field(default=1, kw_only=True)  # the first round of the attack
    until: Positive[int] | None = field(default=None, kw_only=True)  # the last one; null: that of the run

    hidden: ClassVar[frozenset[str]] = frozenset()
    sends_nan: ClassVar[bool] = False  # in place of numbers
    # settings of a run that it cannot be combined with, and why; `dp=sample`: values of `dp` with this word in them
    refuses: ClassVar[Mapping[str, str]] = {}
    reverses: ClassVar[bool] = False  # it must know what updates begin from

    def __post_init__(self) -> None:
        settle(self, self.name())
        if self.share >= 1 and not self.share.is_integer():
            raise UsageError(f"{self.name()}:{self.share} is neither a share of the clients nor a number of them")
        if self.until is not None and self.until < self.from_:
            raise UsageError(
                f"{self.name()}: from={self.from_} to until={self.until} is no round; until is the last one"
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # No import finds a user's file: another process loads it from its path, as this one did.
        if type(self).__module__.startswith(USERS):
            values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
            return _from_file, (str(sys.modules[type(self).__module__].__file__), values)
        return super().__reduce_ex__(protocol)

    @classmethod
    def name(cls) -> str:
        """The name on the command line: that of the class, in small letters."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    def to_text(self) -> str:
        """The text that asks for it; raises UsageError if no text can, for its class lies in no file."""
        kind = type(self)
        offers = (offer for offers in offered("fedloom.attacks").values() for offer in offers)
        place = (kind.__module__, kind.__qualname__)
        named = [offer.name for offer in offers if (offer.module, offer.attribute) == place]
        if kind.__module__.startswith(__name__.rpartition(".")[0]):
            named = [kind.name()]
        file = getattr(sys.modules[kind.__module__], "__file__", None)
        if not named and (file is None or not Path(file).is_file()):
            raise UsageError(
                f"the attack {kind.__name__} is in no file, where other processes would find it: write one"
            )
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(kind) if one.name not in kind.hidden}
        given = ",".join(f"{name.rstrip('_')}={plainly(value)}" for name, value in values.items())
        return f"{named[0] if named else Path(str(file)).resolve()}:{given}"

    def count(self, population: int) -> int:
        """How many of `population` clients it stands for."""
        number = int(self.share) if self.share >= 1 else int(self.share * population + 0.5)
        if self.share and not number:
            raise UsageError(f"{self.name()}:{self.share} of {population} clients is nobody; take a greater share")
        return number

    def fit(self, task: Task) -> Part:
        """This part for a task; raises UsageError for one that it cannot attack, or where it would do nothing."""
        return self

    def attacks_in(self, round: int) -> bool:
        """Whether its clients attack in a round."""
        return self.from_ <= round and (self.until is None or round <= self.until)

    @property
    def trains(self) -> bool:
        """Whether it takes the place of local training, by its own `train`."""
        return type(self).train is not Part.train

    def train(self, client: Client, honest: Training, w: Vector, lr: float, **options: Any) -> tuple[Vector, int]:
        """In place of every `client.descend(w, lr, ...)` of the method: the trained vector, and its number of steps.

        `honest(w, lr, **options)` is the method's own training; `options` are what it gave: `epochs`, `batch`, ... A
        method that takes its steps without `descend` is refused before the first round.
        """
        return honest(w, lr, **options)

    def check_network(self, site: Site) -> None:
        """Raises UsageError for a network that it cannot attack."""

    def act(self, client: Client, call: Call, sent: Sent, inner: Inner) -> Fields:
        """What leaves a malicious client; `inner` does its honest work."""
        return inner()


def plainly(value: Any) -> Any:
    """A value as a setting's text has it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else value


def kind_in(path: str) -> type[Part]:
    """The attack in a user's file."""
    return class_in(module_at(Path(path), "attack"), Part)


def _from_file(path: str, values: Mapping[str, Any]) -> Part:
    return kind_in(path)(**values)
