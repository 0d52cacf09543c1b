"""What a federated algorithm is: a frozen dataclass of hyper-parameters, a server box and client boxes.

Nothing here imports torch, so that listing methods is immediate.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fedloom.errors import UsageError, unknown
from fedloom.fields import coerced
from fedloom.parsing import named
from fedloom.ranges import PLAIN, hints_of
from fedloom.registry import added_name, entry_of, known_as
from fedloom.sources import calls, functions_of
from fedloom.user_files import USERS

if TYPE_CHECKING:
    from fedloom.cohort import Cohort
    from fedloom.node import Client, Server
    from fedloom.site import Site
    from fedloom.vector import Vector

F = TypeVar("F", bound=Callable[..., Any])


def client(function: F) -> F:
    """Marks a function of a method as one that runs where the data is: `(self, client, **message) -> dict | None`.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Mine(fedloom.Method):
        ...     lr: float = 0.1
        ...
        ...     def round(self, server, cohort):
        ...         server.model = server.model + cohort.mean(self.local, model=server.model).delta
        ...
        ...     @fedloom.client
        ...     def local(self, client, model):
        ...         w, steps = client.descend(model, lr=self.lr)
        ...         return {"delta": w - model}
        >>> Mine(lr=0.5).fields()
        {'lr': 0.5}
    """
    function.__client__ = True  # type: ignore[attr-defined]
    return function


def is_client_function(function: object) -> bool:
    """Whether it is marked `@client`."""
    return getattr(function, "__client__", False)


@dataclass(frozen=True)
class Planned:
    """A call that a method makes: the `verb` by which it asks a client function, and in calls of which `kind`."""

    kind: str  # setup, train, finish or evaluate
    verb: str
    function: str  # `local`, `inner.local`


VERBS = ("mean", "means", "call", "stream", "submit", "exchange", "tell", "work")
BOXES = {"setup": ("setup",), "train": ("select", "round"), "finish": ("finish",), "evaluate": ("observe",)}


@dataclass(frozen=True)
class Method:
    """A federated algorithm. Fields are hyper-parameters and nothing else: the far side rebuilds it from them.

    A subclass gives `round`; where its paper asks for it also `setup`, `select`, `finish`, `predict`, and any number
    of functions marked `@client`. Numbers must be finite, and not negative unless their annotation says so
    (`fedloom.ranges`).

    Examples:
        >>> from fedloom.methods.optimize.fedprox import FedProx
        >>> method = FedProx(mu=0.1)
        >>> method.name(), method.fields()["mu"]
        ('fedprox', 0.1)
    """

    global_model: ClassVar[bool] = True  # False: `server.model` is no model of its own (personal or local models only)
    compressible: ClassVar[tuple[str, ...]] = ()  # reply fields that are differences and may be compressed
    private: ClassVar[tuple[str, ...]] = ()  # reply fields a privacy mechanism may clip and noise
    # What attackers take for an update. A reply's field is one, or a model under the name it was sent by; a model that
    # came by another name says where: the message's field, or `state.NAME` for what the client remembers.
    updates: ClassVar[Mapping[str, str]] = {}
    # A reply's field that is a difference says from which of the message's fields; `delta` is one from `model` unasked.
    differences: ClassVar[Mapping[str, str]] = {}
    factors: ClassVar[tuple[str, ...]] = ()  # places in a reply (`factors.*.0`) that only multiply others: left alone
    rankings: ClassVar[tuple[str, ...]] = ()  # fields of Packed orders, whose opposite is the reversed order
    needs: ClassVar[tuple[str, ...]] = ()  # what the task must offer: "public" data at the server, ...
    by_class: ClassVar[bool] = False  # it works class by class, and so refuses problems whose samples have no one class
    by_head: ClassVar[bool] = False  # it works on the network's head or body, and so refuses networks without these
    # settings of a run that it cannot be combined with, and why; `dp=sample`: values of `dp` with this word in them
    refuses: ClassVar[Mapping[str, str]] = {}
    one_shot: ClassVar[bool] = False  # training is one round, however many the run asks for
    scheduled: ClassVar[bool] = False  # it goes by `server.planned`, so that a run's rounds are fixed when it begins
    rough: ClassVar[bool] = False  # signs, ranks or matchings make large differences of rounding
    light: ClassVar[Mapping[str, Any]] = {}  # fields with which the contract tries it, where the defaults take long

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _declared_rightly(cls)

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):
            value, where, hint = getattr(self, field.name), f"{self.name()}.{field.name}", hints[field.name]
            value = _nested(where, value) if hint.type is Method else coerced(where, value, hint.type)
            object.__setattr__(self, field.name, value)
            if not hint.range.holds(value):
                meant = value == field.default and hint.range is PLAIN
                signed = f", or declared as {field.name}: Signed[{type(value).__name__}]" if meant else ""
                raise UsageError(f"{where} is {value}; it must be {hint.range}{signed}")

    def __reduce_ex__(self, protocol: typing.SupportsIndex) -> Any:
        # No import finds a user's file: a process that was not forked loads it from its path, as this one did. What a
        # package adds is loaded by its name, which the class does not know.
        if type(self).__module__.startswith(USERS) or added_name(type(self)):
            return build, (known_as(type(self)), self.fields())
        return super().__reduce_ex__(protocol)

    @classmethod
    def name(cls) -> str:
        """The name on the command line: that of the file, or of the entry point by which a package adds it.

        A class of a notebook or a script is called by its own name, in small letters.
        """
        if cls.__module__ == "__main__":
            return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        return added_name(cls) or cls.__module__.rpartition(".")[2]

    def fields(self) -> dict[str, Any]:
        """The hyper-parameters as plain values: `type(method)(**method.fields()) == method`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.to_spec() if isinstance(value, Method) else value for name, value in values.items()}

    def to_spec(self) -> dict[str, Any]:
        """The method as a spec has it: its name, or the file that it is in, and its fields."""
        module = type(self).__module__
        name = known_as(type(self)) or getattr(sys.modules[module], "__file__", f"{module}/{self.name()}")
        return {"name": str(name), **self.fields()}

    def path_of(self, function: Callable[..., Any]) -> str | None:
        """Where a bound client function of this method, or of one that it wraps, is found: `local`, `inner.local`."""
        owner = getattr(function, "__self__", None)
        if owner is self:
            return function.__name__
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Method) and (path := value.path_of(function)):
                return f"{field.name}.{path}"
        return None

    @classmethod
    def client_functions(cls) -> dict[str, Callable[..., Any]]:
        """The functions marked `@client`, in the order of the class's text."""
        mine = {name: f for base in reversed(cls.__mro__) for name, f in vars(base).items()}
        return {name: f for name, f in mine.items() if inspect.isfunction(f) and is_client_function(f)}

    @property
    def nested(self) -> tuple[Method, ...]:
        """This method and, inside it, those that it wraps: the outermost first."""
        inner = (getattr(self, field.name) for field in dataclasses.fields(self))
        return (self, *(one for value in inner if isinstance(value, Method) for one in value.nested))

    def of_training(self, name: str) -> Any:
        """A field of the method that trains (`batch`, `epochs`): the innermost that has it; None if none has."""
        return next((getattr(one, name) for one in reversed(self.nested) if hasattr(one, name)), None)

    @cached_property
    def plan(self) -> tuple[Planned, ...]:
        """The calls that its boxes make, and those of methods that it wraps: read from their text, before any is made.

        A call that the text does not show as `cohort.verb(self.function, ...)` is not among them.
        """
        bases = reversed([base for base in type(self).__mro__ if issubclass(base, Method) and base is not Method])
        texts, own = functions_of(bases), self.client_functions()
        mine = [Planned(kind, *call) for kind, boxes in BOXES.items() for call in calls(texts, own, boxes, VERBS)]
        inner = [
            replace(call, function=f"{field.name}.{call.function}")
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Method)
            for call in value.plan
        ]
        return tuple(dict.fromkeys([*mine, *inner]))

    @classmethod
    def search_space(cls) -> dict[str, tuple[Any, ...]]:
        """Where a search looks for each field that has such a range: (low, high, "log" or "linear"), or choices."""
        return {name: hint.search for name, hint in hints_of(cls).items() if hint.search is not None}

    def networks(self, site: Site) -> Mapping[str, Vector]:
        """The networks that it has beside the task's, by name: `{"gate": site.network(Gate, *site.task.shape)}`.

        Asked at every place where nodes live, before anything else and after a resumption too: vectors of their layouts
        run there from then on, and `node.nets["gate"]` are the initial weights, alike everywhere, at no bytes.
        `site.network(make, *args)` makes one from nothing, `site.derive(make, *args)` from the task's own.
        """
        return {}

    def setup(self, server: Server, clients: Cohort) -> None:
        """Once, before the first round: declares server values (`server.control = ...`); `clients` is everybody."""

    def phases(self, server: Server) -> Sequence[tuple[str, int | None]]:
        """The phases of a run, in their order: names and numbers of rounds, None for the last, which goes to the end.

        `select`, `round` and the others find in `server.phase` which it is. To be made of the fields, of
        `server.population` and, if the method is `scheduled`, of `server.planned` alone.
        """
        return ()

    def select(self, server: Server, clients: Cohort) -> Cohort | None:
        """The cohort of this round out of everybody, where the method chooses; None leaves it to the world."""
        return None

    def round(self, server: Server, cohort: Cohort) -> None:
        """One server step."""
        raise NotImplementedError(f"{type(self).__name__} has no round(server, cohort)")

    def finish(self, server: Server, clients: Cohort) -> None:
        """Once, after the last round."""

    def observe(self, server: Server, clients: Cohort) -> Any:
        """Before an evaluation: gathers what only measuring needs, charged to evaluation.

        It may return what is judged in place of `server.model`: another Vector, a function from inputs [B, ...] to
        scores [B, C], or any message value (`Task.judges_values`); or several by name, the first being the main one.
        """
        return None

    @client
    def predict(self, client: Client, model: Any) -> Any:
        """What is judged on the client's own test: whatever `observe` may return, under the same names at all clients.

        Its parameters name server values, which are what is sent. Default: the global model.
        """
        return model

    def predict_message(self, server: Server, clients: Cohort) -> dict[str, Any]:
        """What `predict` is sent at `clients`, who are judged: server values that it names, or an `Each` for them."""
        names = list(inspect.signature(self.predict).parameters)[1:]
        return {name: getattr(server, name) for name in names}

    @client
    def evaluate(self, client: Client, **message: Any) -> dict[str, Any]:
        """Judges `predict` on the client's own validation and test data; never used in training."""
        judged = self.predict(client, **message)
        return {split: client.evaluate(judged, split) for split in ("validation", "test")}

    @client
    def join(self, client: Client, **message: Any) -> None:
        """What a newcomer does before it is judged; `message` is what `predict` is sent. Default: nothing.

        It may train on its own data, and keep what `predict` needs in `client.state`, which is empty before and lasts
        for this judgement only.
        """

    @client
    def judge_newcomer(self, client: Client, **message: Any) -> dict[str, Any]:
        """Judges a newcomer, once it has joined; never used in training."""
        if client.n:
            self.join(client, **message)
        return self.evaluate(client, **message)


def client_function(method: Method, path: str) -> Callable[..., Any]:
    """The bound client function of a method at a path, as `path_of` gives it; raises UsageError where there is none.

    It leads through methods that are fields only, and ends at a function marked `@client`: nothing else that a server
    may ask for is followed.
    """
    *way, name = path.split(".")
    owner: Any = method
    for step in way:
        owner = getattr(owner, step) if isinstance(owner, Method) and step in owner.__dataclass_fields__ else None
    function = getattr(type(owner), name, None) if isinstance(owner, Method) else None
    if not (inspect.isfunction(function) and is_client_function(function)):
        raise UsageError(f"{method.name()} has no client function {path!r}")
    bound: Callable[..., Any] = getattr(owner, name)
    return bound


def has_rate(method: Method) -> bool:
    """Whether a method, or one that it wraps, has a learning rate `lr`."""
    return any("lr" in (field.name for field in dataclasses.fields(one)) for one in method.nested)


def paced(method: Method, pace: float) -> Method:
    """A method with its learning rate `lr`, and that of methods that it wraps, times a factor."""
    return method if pace == 1 else _paced(method, pace)


@lru_cache(maxsize=64)
def _paced(method: Method, pace: float) -> Method:
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    changed = {name: paced(value, pace) for name, value in values.items() if isinstance(value, Method)}
    if isinstance(values.get("lr"), float):
        changed["lr"] = values["lr"] * pace
    return replace(method, **changed)


def _nested(where: str, value: Any) -> Method:
    """A method that is a field of another: given as it is, by name, or by name and fields."""
    if isinstance(value, str):
        value = named(value)
    if isinstance(value, type) and issubclass(value, Method):
        return value()
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return build(value["name"], {name: field for name, field in value.items() if name != "name"})
    if not isinstance(value, Method):
        raise UsageError(f"{where} is {value!r}; it must be a method: its name, or {{name: ..., field: value, ...}}")
    return value


def _declared_rightly(cls: type[Method]) -> None:
    """Raises UsageError for a class variable that means nothing (a slip, a field without its type) or is no such value.

    Variables of one's own are annotated as ClassVar, or written in capitals.
    """
    known = inspect.get_annotations(Method)
    own = inspect.get_annotations(cls).keys() - known.keys()
    for name in GONE:
        if name in vars(cls) and "ClassVar" in str(inspect.get_annotations(cls).get(name, "ClassVar")):
            raise UsageError(f"{cls.__name__}.{name} has no meaning any more; {GONE[name]}")
    for name, value in vars(cls).items():
        spoken = callable(value) or isinstance(value, property | cached_property | classmethod | staticmethod)
        if spoken or name in own or name.startswith("_") or name.isupper():
            continue
        if name not in known:
            slip = unknown(f"class variable of {cls.__name__}", name, known)
            typed = f"{name}: {type(value).__name__} = {value!r}"
            raise UsageError(f"{slip}; a hyper-parameter has its type beside it, as in {typed}")
        kind = type(getattr(Method, name))
        if not isinstance(value, kind) or (kind is tuple and not all(isinstance(one, str) for one in value)):
            raise UsageError(f"{cls.__name__}.{name} is {value!r}; it must be a {DECLARATIONS[kind]}")


GONE = {
    "signed": "a field that may be negative is declared with its type: shift: Signed[float] (of fedloom.ranges)",
    "ranges": "where a search looks stands with the field's type: mu: Annotated[float, Log(1e-3, 1.0)], and a learning "
    "rate is lr: LearningRate (of fedloom.ranges)",
}
DECLARATIONS = {tuple: "tuple of names, as in ('delta',)", dict: "dict", bool: "truth value"}


def build(name: str, fields: Mapping[str, Any] | None = None) -> Method:
    """A method from its name (or file) and some of its fields; the rest take their defaults."""
    cls = entry_of(name).load(Method)
    known = [field.name for field in dataclasses.fields(cls)]
    for field in fields or {}:
        if field not in known:
            raise unknown(f"field of {name}", field, known)
    return cls(**(fields or {}))
