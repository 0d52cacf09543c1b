"""Methods around any other method: at its server, at its clients, in the weights of its means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.errors import Refused, UsageError
from fedloom.method import Method, client

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.cohort import Cohort
    from fedloom.node import Client, Server
    from fedloom.site import Site
    from fedloom.vector import Vector


Weights = Mapping[int, float] | None  # how much clients count in a mean; None: as much as they say


class OfInner(property):
    """A declaration of the inner method; of the class itself, which has none yet, the default."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, plugin: Any, owner: type | None = None) -> Any:
        return getattr(Method if plugin is None else plugin.inner, self.name)


@dataclass(frozen=True)
class Plugin(Method):
    """A method around another one, `inner`: whatever it does not give itself is that one's.

    A field of the type `Method` takes a method, its name, or its name and fields: `{"name": "fedprox", "mu": 0.1}`. The
    inner method's client functions are called as they are, with their own messages: `self.inner.round(server, cohort)`.

    Beside the boxes it may give three functions: `around` acts at the clients in every call of the inner method in a
    round, `held` names the server values that `around` gets, and `weigh` says how much clients count in a mean.
    """

    inner: Method

    # What is declared of the problem, the replies and the global model is the inner method's.
    global_model = OfInner()
    compressible = OfInner()
    private = OfInner()
    needs = OfInner()
    one_shot = OfInner()
    scheduled = OfInner()
    rough = OfInner()

    def around(self, client: Client, inner: Callable[[], dict[str, Any]], **held: Any) -> dict[str, Any]:
        """At a client, around a client function of the inner method: the reply that leaves it.

        `inner()` gives that function's own reply. Before it is called, `client.given = data` puts other training data
        in place of the client's own, and `client.wrap_loss(wrap)` another loss in place of every loss. `held` are the
        values that `held` named.
        """
        return inner()

    def held(self, server: Server) -> Mapping[str, Any]:
        """What goes along with every call of the inner method in a round, by the names under which `around` takes it.

        Server values for the most part; an `Each` gives each client one of its own. It is booked as any message, and
        the inner method's client functions do not see it.
        """
        return {}

    def weigh(self, server: Server, cohort: Cohort) -> Mapping[int, float]:
        """How much each client of a cohort counts when a round takes their mean: in place of the number that it sends.

        Weights are finite and not negative; only their proportions matter.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weigh(server, cohort)")

    def networks(self, site: Site) -> Mapping[str, Vector]:
        return self.inner.networks(site)

    def setup(self, server: Server, clients: Cohort) -> None:
        self.inner.setup(server, clients)

    def phases(self, server: Server) -> Sequence[tuple[str, int | None]]:
        return self.inner.phases(server)

    def select(self, server: Server, clients: Cohort) -> Cohort | None:
        return self.inner.select(server, clients)

    def round(self, server: Server, cohort: Cohort) -> None:
        self.inner.round(server, cohort)

    def finish(self, server: Server, clients: Cohort) -> None:
        self.inner.finish(server, clients)

    def observe(self, server: Server, clients: Cohort) -> Any:
        return self.inner.observe(server, clients)

    @client
    def predict(self, client: Client, **message: Any) -> Any:  # type: ignore[override]
        return self.inner.predict(client, **message)

    def predict_message(self, server: Server, clients: Cohort) -> dict[str, Any]:
        return self.inner.predict_message(server, clients)

    @client
    def join(self, client: Client, **message: Any) -> None:
        self.inner.join(client, **message)


def welcomes(method: Method) -> bool:
    """Whether a newcomer gets anything: it joins, or `predict` is sent something."""
    if isinstance(method, Plugin):
        return gives(method, "join") or welcomes(method.inner)
    return type(method).join is not Method.join or len(inspect.signature(method.predict).parameters) > 1


def gives(method: Method, hook: str) -> bool:
    """Whether a method is a plug-in that gives a hook of its own: `around`, `held`, `weigh`."""
    return isinstance(method, Plugin) and getattr(type(method), hook) is not getattr(Plugin, hook)


def plugins_of(method: Method, hook: str) -> list[Plugin]:
    """The plug-ins in a method that give a hook, the outermost first."""
    return [one for one in method.nested if isinstance(one, Plugin) and gives(one, hook)]


def plugins_around(method: Method, function: str, hook: str) -> Iterator[tuple[int, Plugin]]:
    """The plug-ins around a client function (`inner.local`) that give a hook, with their depths: outermost first."""
    owner = method
    for depth, name in enumerate(function.split(".")[:-1]):
        if name == "inner" and isinstance(owner, Plugin) and gives(owner, hook):
            yield depth, owner
        owner = getattr(owner, name)


def prefix(depth: int) -> str:
    """What begins the names of the fields in which the values of the plug-in at a depth go along with a message."""
    return f"_held{depth or ''}_"


def held_along(method: Method, function: str, kind: str, verb: str, server: Server | None) -> dict[str, Any]:
    """The fields that go along with a call of a client function in a round, for the plug-ins around it."""
    along: dict[str, Any] = {}
    for depth, plugin in plugins_around(method, function, "held"):
        values = plugin.held(server) if server is not None and kind == "train" else {}
        if values and verb == "work":
            raise Refused(
                f"{plugin.name()} sends {', '.join(values)} along with what {plugin.inner.name()} asks of its clients, "
                "and that lets them work without any message; take another method"
            )
        along |= {prefix(depth) + name: value for name, value in values.items()}
    return along


def held_at(depth: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """What the plug-in at a depth finds in a message."""
    ours = prefix(depth)
    return {field.removeprefix(ours): value for field, value in message.items() if field.startswith(ours)}


def weights_in_means(method: Method, call: Call, server: Server | None, cohorts: Iterable[Cohort]) -> Weights:
    """How much the clients of cohorts count, each in the mean of its own, where a plug-in of the method says so.

    Raises UsageError for weights that are none.
    """
    plugin = next((plugin for _, plugin in plugins_around(method, call.function, "weigh")), None)
    if plugin is None or server is None or call.kind != "train":
        return None
    found: dict[int, float] = {}
    for cohort in cohorts:
        weights = plugin.weigh(server, cohort)
        for asked in cohort:
            number = weights.get(asked)
            if not isinstance(number, int | float) or not 0 <= number < float("inf"):
                raise UsageError(
                    f"{plugin.name()}.weigh gives client {asked} the weight {number!r}; every client asked needs one "
                    "that is finite and not negative"
                )
            found[asked] = float(number)
    return found
