"""The stages on the way of a message, in the order in which a reply meets it.

    optimizer   what makes the steps of a client's descents                     (at the client)
    attack      a malicious client's data, function or reply                    (at the client)
    dp          clipping, and noise that a client adds itself                   (at the client)
    compress    a declared difference, made small; undone where it arrives      (at the client)
    channel     noise on what arrives; in the air, on the sum                   (on the way)
    collusion   attackers that know of each other's replies                     (on the way)
    faults      replies duplicated, mangled or oversized; the door turns bad ones away
    secure      the sum is taken under masks                                    (at the server, of `mean`)
    aggregate   a robust rule in place of the mean, after which `mean` tells what `call` tells
    dp          noise on the sum
    cache       what a client holds costs its hash                              (of a message to a client)

Methods know of none of it. What makes no sense together is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

from fedloom.boundary.stage import Stage
from fedloom.calls import SILENT, SUMMED
from fedloom.errors import UsageError
from fedloom.plugin import plugins_of

if TYPE_CHECKING:
    from fedloom.boundary.attack.attack import Attack
    from fedloom.boundary.books import Books
    from fedloom.boundary.faults import Faults
    from fedloom.boundary.stage import Combined, Gathered, Groups
    from fedloom.calls import Call, Layer
    from fedloom.cohort import Mean
    from fedloom.mean import Sum
    from fedloom.method import Method
    from fedloom.node import Server
    from fedloom.runs.spec import Spec
    from fedloom.task import Task

S = TypeVar("S", bound=Stage)


@dataclass(frozen=True)
class Pipeline:
    """The stages of a run, in their order, and what they do together; by default there are none."""

    stages: tuple[Stage, ...] = ()

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What wraps the client functions, the innermost first."""
        return tuple(layer for stage in self.stages for layer in stage.at_clients())

    @cached_property
    def _having(self) -> dict[str, tuple[Stage, ...]]:
        hooks = [name for name, hook in vars(Stage).items() if callable(hook)]
        return {h: tuple(s for s in self.stages if getattr(type(s), h) is not getattr(Stage, h)) for h in hooks}

    def with_hook(self, hook: str, kind: str | None = None) -> Iterable[Any]:
        """The stages that do something at a hook, in calls of a kind."""
        stages = self._having[hook]
        return stages if kind is None else [stage for stage in stages if kind in stage.kinds]

    def one(self, kind: type[S]) -> S | None:
        """The stage of a class, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    def whole(self, kind: str) -> bool:
        """Whether the means of calls of a kind need the replies one by one, so that no worker may sum them."""
        return any(True for hook in ("combine", "outcomes") for _ in self.with_hook(hook, kind))

    def message_sizes(self, books: Books, call: Call, plain: Callable[[], Groups]) -> Groups:
        """How many bytes a message takes to whom."""
        for stage in self.with_hook("message_sizes", call.kind):
            plain = partial(stage.message_sizes, books, call, plain)
        return plain()

    def combined(self, books: Books, call: Call, replies: Gathered, plain: Callable[[], Combined]) -> Combined:
        """What the server makes of replies that it has one by one, and whose it took."""
        for stage in self.with_hook("combine", call.kind):
            plain = partial(stage.combine, books, call, replies, plain)
        return plain()

    def total(self, books: Books, call: Call, total: Sum | None) -> Sum | None:
        """A sum of replies on its way to its mean."""
        for stage in self.with_hook("total", call.kind):
            total = stage.total(books, call, total)
        return total

    def mean(self, books: Books, call: Call, mean: Mean) -> Mean:
        """A mean on its way to the method."""
        for stage in self.with_hook("mean", call.kind):
            mean = stage.mean(books, call, mean)
        return mean

    def observe(self, books: Books, server: Server, observe: Callable[[], Any]) -> Any:
        """What a method's `observe` gives."""
        for stage in self.with_hook("observe"):
            observe = partial(stage.observe, books, server, observe)
        return observe()

    def collect(self, hook: str, *about: Any) -> dict[str, Any]:
        """What all stages say at `measure`, `round_row`, `manifest` or `final_manifest`."""
        said: dict[str, Any] = {}
        for stage in self.with_hook(hook):
            said |= getattr(stage, hook)(*about)
        return said

    def stop_reason(self, books: Books) -> str | None:
        """Why the run ends before its next round, if it does."""
        return next((why for stage in self.with_hook("stop_reason") if (why := stage.stop_reason(books))), None)

    def unused(self, books: Books) -> str | None:
        """A setting for sums that found none in a round that heard of clients; None if all had something to do."""
        if not books.replies or books.summed:
            return None
        return next((stage.setting for stage in self.with_hook("combine")), None)

    @staticmethod
    def of(spec: Spec, method: Method, task: Task) -> Pipeline:
        """What a run's settings ask for; raises UsageError for a combination that makes no sense."""
        stages: list[Stage] = []
        late: list[Stage] = []  # attackers that act on the way
        _at_work(spec, method)
        for one, other, reason in CLASHES:
            if getattr(spec, one) and getattr(spec, other):
                raise UsageError(f"{one}={getattr(spec, one)} and {other}={getattr(spec, other)}: {reason}")
        if spec.optimizer:
            from fedloom.boundary.local_optimizer import LocalOptimizer

            stages.append(LocalOptimizer.of(spec.optimizer, method.name(), spec.dp))
        attack: Attack | None = None
        if spec.attack:
            from fedloom.boundary import attack as attacks
            from fedloom.boundary.attack.numbers import Updates

            rounds = 1 if method.one_shot else spec.rounds
            attack = attacks.build(spec.attack, task, spec.seed, Updates.of(method), rounds)
            late = attacks.on_the_way(attack)
            stages.append(attack)
        if spec.dp:
            from fedloom.boundary import privacy

            stages.append(privacy.build(spec.dp, spec, method, task))
        if spec.compress:
            from fedloom.boundary.compress import Compress

            stages.append(Compress.of(spec.compress, method))
        if spec.channel:
            from fedloom.boundary.channel import Channel

            stages.append(Channel.of(spec, method))
        stages += late
        if spec.faults or spec.attack:
            from fedloom.boundary.faults import Faults

            stages.append(faults := Faults.of(spec.faults, spec.seed, whole=bool(spec.aggregate)))
            _sound(spec, method, attack, faults)
        if spec.cache:
            from fedloom.boundary.cache import Cache

            stages.append(Cache())
        if spec.secure:
            from fedloom.boundary.secure import Secure

            stages.append(Secure.parse(spec.secure))
        if spec.aggregate:
            from fedloom.boundary.aggregate import Aggregate

            stages.append(Aggregate.of(spec.aggregate, method))
        for stage in stages:
            for planned in method.plan:
                stage.check_call(planned)
        return Pipeline(tuple(stages))


def _at_work(spec: Spec, method: Method) -> None:
    """Raises UsageError for a setting that has nothing to act on in the calls that a method plans."""
    verbs = {call.verb for call in method.plan if call.kind == "train"}
    for setting in ("attack", "dp", "channel", "compress", "faults", "secure", "aggregate"):
        if method.plan and not verbs and getattr(spec, setting):
            raise UsageError(
                f"{setting}={getattr(spec, setting)} acts on what clients do in a round, and those of {method.name()} "
                "do nothing there; leave it out, or take a method that trains at its clients"
            )
    acts = dict.fromkeys(("dp", "compress", "faults", "lost", "deadline", "overselect"), ("replies", SILENT))
    acts |= dict.fromkeys(("dropout", "channel"), ("messages", frozenset({"work"})))
    for setting, (what, without) in acts.items():
        if verbs and verbs <= without and (value := getattr(spec, setting)) != getattr(type(spec), setting):
            raise UsageError(
                f"{setting}={value} acts on {what}, and there are none in the rounds of {method.name()}, whose clients "
                f"are asked by {' and '.join(sorted(verbs))} only; leave it out, or take another method"
            )
    _weighed(spec, method)
    for setting, part in (("secure", "masks the sums"), ("aggregate", "takes the place of the mean")):
        if method.plan and verbs.isdisjoint(SUMMED) and getattr(spec, setting):
            raise UsageError(
                f"{setting}={getattr(spec, setting)} {part} that a server asks for by `mean`, and {method.name()} asks "
                "for none in its rounds; leave it out, or take a method that does, such as fedavg"
            )


def _weighed(spec: Spec, method: Method) -> None:
    """Raises UsageError for a plug-in that says how much clients count, where nobody would listen."""
    plugins = plugins_of(method, "weigh")
    for plugin in plugins:
        name, inner = plugin.name(), plugin.inner
        if len(plugins) > 1:
            raise UsageError(f"{name} and {plugins[1].name()} both say how much clients count in a mean; leave one out")
        verbs = {call.verb for call in inner.plan if call.kind == "train"}
        if inner.plan and verbs.isdisjoint(SUMMED):
            raise UsageError(
                f"{name} says how much clients count in a mean, and {inner.name()} asks for none in its rounds; take a "
                "method that does, such as fedavg"
            )
        for setting, word, why in UNWEIGHED:
            if (value := getattr(spec, setting)) and word in value:
                raise UsageError(f"{name} says how much clients count, and does not go with {setting}={value}: {why}")


UNWEIGHED = (
    ("secure", "", "under masks clients weigh their replies themselves"),
    ("aggregate", "", "a robust rule takes the place of the mean"),
    ("channel", "air", "in the air clients weigh their replies themselves"),
    ("dp", "client", "the noise on a sum is for clients that all count alike"),
    ("dp", "local", "replies that are noised count alike"),
)


def _sound(spec: Spec, method: Method, attack: Attack | None, faults: Faults) -> None:
    """Raises UsageError for attackers or faults that the other stages rule out."""
    nan = attack is not None and attack.sends_nan
    if "lost" in method.refuses and (faults.shares or nan):
        setting = f"faults={spec.faults}" if faults.shares else f"attack={spec.attack}"
        raise UsageError(f"{method.name()} does not go with {setting}: {method.refuses['lost']}")
    for part in attack.parts if attack else ():
        for refused, why in part.refuses.items():
            setting, _, word = refused.partition("=")
            if getattr(spec, setting) and word in str(getattr(spec, setting)):
                raise UsageError(f"attack={part.name()} does not go with {setting}={getattr(spec, setting)}: {why}")
    if spec.channel and "air" in spec.channel and nan:
        raise UsageError(
            f"channel={spec.channel} and attack={spec.attack}: in the air no reply can be turned away, and NaN is no "
            "amplitude"
        )
    if spec.secure and (nan or faults.inside):
        raise UsageError(
            f"secure={spec.secure} with attack={spec.attack}, faults={spec.faults}: under a mask every number is a "
            "whole one of the field, so that there is no NaN, infinity, other shape or other type to send"
        )


CLASHES = (
    ("aggregate", "secure", "a robust rule must see every reply, and secure aggregation shows only their sum"),
    (
        "compress",
        "secure",
        "masks make every number as long as any other, so that compression saves nothing under them",
    ),
)
