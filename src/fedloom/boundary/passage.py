"""What stands on the way of a message, in the order in which a reply meets it.

    attack      a malicious client's data, function or reply                    (at the client)
    dp          clipping, and noise that a client adds itself                   (at the client)
    compress    a declared difference, made small; undone where it arrives      (at the client)
    collusion   attackers that know of each other's replies                     (on the way)
    faults      replies duplicated, mangled or oversized; the door turns bad ones away
    secure      the sum is taken under masks                                    (at the server, of `mean`)
    aggregate   a robust rule in place of the mean, after which `mean` tells what `call` tells
    dp          noise on the sum

Methods know of none of it. What makes no sense together is refused before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.boundary.layer import Layer, Transit
from fedloom.errors import UsageError

if TYPE_CHECKING:
    from fedloom.aggregators import Rule
    from fedloom.boundary.attack import Attack
    from fedloom.boundary.faults import Faults
    from fedloom.boundary.privacy import Privacy
    from fedloom.boundary.secure import Secure
    from fedloom.method import Method
    from fedloom.spec import Spec
    from fedloom.task import Task


@dataclass(frozen=True)
class Passage:
    """The parts that a spec asks for; by default there are none."""

    layers: tuple[Layer, ...] = ()
    transits: tuple[Transit, ...] = ()
    rule: Rule | None = None
    secure: Secure | None = None
    privacy: Privacy | None = None
    attack: Attack | None = None
    cache: bool = False  # what a client holds costs its hash

    def whole(self, kind: str) -> bool:
        """Whether the means of calls of a kind need the replies one by one, so that no worker may sum them."""
        ruled = kind == "train" and (self.rule or self.secure)
        return bool(ruled or any(kind in transit.kinds for transit in self.transits))

    @staticmethod
    def of(spec: Spec, method: Method, task: Task) -> Passage:
        """What a run's settings ask for; raises UsageError for a combination that makes no sense."""
        layers: list[Layer] = []
        transits: list[Transit] = []
        parts: dict[str, Any] = {"cache": spec.cache}
        _at_work(spec, method)
        for one, other, reason in CLASHES:
            if getattr(spec, one) and getattr(spec, other):
                raise UsageError(f"{one}={getattr(spec, one)} and {other}={getattr(spec, other)}: {reason}")
        if spec.attack:
            from fedloom.boundary.attack import Attack
            from fedloom.boundary.attack.numbers import Updates

            parts["attack"] = attack = Attack.of(spec.attack, task, spec.seed, Updates.of(method))
            layers.append(attack)
            transits += attack.transits()
        if spec.dp:
            from fedloom.boundary.privacy import Privacy

            parts["privacy"] = privacy = Privacy.of(spec.dp, spec, method, task)
            layers += privacy.layers()
        if spec.compress:
            from fedloom.boundary.compress import Compress

            layers.append(Compress.of(spec.compress, method))
        if spec.faults or spec.attack:
            from fedloom.boundary.faults import Faults

            transits.append(faults := Faults.of(spec.faults, spec.seed))
            _sound(spec, method, parts.get("attack"), faults)
        if spec.secure:
            from fedloom.boundary.secure import Secure

            parts["secure"] = secure = Secure.parse(spec.secure)
            for planned in method.plan:
                secure.admit(planned)
        if spec.aggregate:
            from fedloom.aggregators import build

            parts["rule"] = build(spec.aggregate)
        return Passage(tuple(layers), tuple(transits), **parts)


def _at_work(spec: Spec, method: Method) -> None:
    """Raises UsageError for a setting that has nothing to act on in the calls that a method plans."""
    verbs = {call.verb for call in method.plan if call.kind == "train"}
    for setting in ("attack", "dp", "compress", "faults", "secure", "aggregate"):
        if method.plan and not verbs and getattr(spec, setting):
            raise UsageError(
                f"{setting}={getattr(spec, setting)} acts on what clients do in a round, and those of {method.name()} "
                "do nothing there; leave it out, or take a method that trains at its clients"
            )
    for setting, part in (("secure", "masks the sums"), ("aggregate", "takes the place of the mean")):
        if method.plan and "mean" not in verbs and getattr(spec, setting):
            raise UsageError(
                f"{setting}={getattr(spec, setting)} {part} that a server asks for by `mean`, and {method.name()} asks "
                "for none in its rounds; leave it out, or take a method that does, such as fedavg"
            )


def _sound(spec: Spec, method: Method, attack: Attack | None, faults: Faults) -> None:
    """Raises UsageError for attackers or faults that the rest of the passage rules out."""
    nan = attack is not None and attack.sends_nan
    if "lost" in method.refuses and (faults.shares or nan):
        setting = f"faults={spec.faults}" if faults.shares else f"attack={spec.attack}"
        raise UsageError(f"{method.name()} does not go with {setting}: {method.refuses['lost']}")
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
