"""How a method meets the settings of a run: each shows its effect, or is refused in a sentence before the first round.

A setting that does nothing, and says nothing, makes a number mean something else than its reader believes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedloom.boundary import attack
from fedloom.errors import UsageError
from fedloom.runs.experiment import Experiment
from fedloom.testing.lab import ROUNDS, SEVEN, Lab, Trace, difference, require, trace

Effect = Callable[[Trace, Trace, Experiment], bool]


@dataclass(frozen=True)
class Setting:
    """A setting of a run, and how its effect shows beside a run without it."""

    name: str
    values: Mapping[str, Any]
    shows: Effect
    effect: str  # in words

    @property
    def __name__(self) -> str:
        return f"check_under_{self.name.replace(' ', '_')}"

    def __call__(self, lab: Lab) -> None:
        """Raises ContractError unless the setting shows its effect, or is refused before a client has worked."""
        made = None
        try:
            made = lab.begun(lab.toy(sizes=SEVEN), **{"eval_every": ROUNDS} | dict(self.values))
            made.go()
        except UsageError as refusal:
            worked = ", ".join(made.boundary.books.verbs) if made else ""
            require(not worked, f"{self.values} is refused only after {worked} has run: {refusal}")
            return
        require(
            self.shows(lab.many, trace(made), made),
            f"{self.values} has no effect ({self.effect}), and is not refused; give the method refuses = {{...: why}}",
        )


def moves(before: Trace, after: Trace, made: Experiment) -> bool:
    """Whether server values or clients' states differ."""
    return any(difference(before[part], after[part]) for part in ("server", "states"))


def sent(trace: Trace, field: str = "", direction: str = "up") -> int:
    """Bytes of training rounds in one direction, of fields that begin with a text."""
    return sum(
        line["bytes"] * len(line["clients"])
        for line in trace["ledger"]
        if line["direction"] == direction and line["kind"] == "train" and line["field"].startswith(field)
    )


def masked(before: Trace, after: Trace, made: Experiment) -> bool:
    """Whether the sum was taken under masks."""
    return sent(after, "secure.") > 0


def shorter(before: Trace, after: Trace, made: Experiment) -> bool:
    """Whether fewer bytes came up."""
    return sent(after) < sent(before)


def stated(before: Trace, after: Trace, made: Experiment) -> bool:
    """Whether the model differs, and the record says what is guaranteed."""
    return moves(before, after, made) and bool(made.record.manifest.get("dp"))


def counted(before: Trace, after: Trace, made: Experiment) -> bool:
    """Whether the record counts faults."""
    return sum(number for row in after["metrics"] for name, number in row.items() if name.startswith("fault/")) > 0


def saves(before: Trace, after: Trace, made: Experiment) -> bool:
    """Whether everything is as it was, and no more bytes go down."""
    same = not any(difference(before[part], after[part]) for part in ("server", "states"))
    return same and sent(after, direction="down") <= sent(before, direction="down")


def from_then_on(before: Trace, after: Trace, made: Experiment) -> bool:
    """Whether something differs, and nothing in the first round.

    Where work takes longer than a round, what attackers were asked for may come after the few rounds that there are.
    """
    whole = ("global_test_", "gradient_steps", "replies", "cohort")
    early, honest = ({n: v for n, v in trace["metrics"][0].items() if n.startswith(whole)} for trace in (after, before))
    if not moves(before, after, made):
        long = replace(made.spec, rounds=LONG)
        runs = [
            Experiment(replace(long, attack=kind), made.task, made.method).begin(None) for kind in (None, long.attack)
        ]
        for run in runs:
            run.go()
        before, after = map(trace, runs)
    return moves(before, after, made) and early == honest


LONG = 12  # rounds, in which all that was submitted in the second has come

TRAINED = "server values and clients' states are as without it"
CHECKS = (
    Setting("dp of clients", {"dp": "client:noise=1.0,clip=0.5"}, stated, TRAINED),
    Setting("dp of samples", {"dp": "sample:noise=1.0,clip=0.5"}, stated, TRAINED),
    Setting("local dp", {"dp": "local:gaussian,epsilon=50,clip=0.5"}, stated, TRAINED),
    Setting("another optimizer", {"optimizer": "adam"}, moves, TRAINED),
    Setting("a schedule", {"schedule": "warmup:4"}, moves, TRAINED),
    Setting("another loss", {"loss": "focal:2"}, moves, TRAINED),
    Setting("secure sums", {"secure": "bonawitz"}, masked, "nothing was masked"),
    Setting("the median", {"aggregate": "median"}, moves, TRAINED),
    Setting("krum", {"aggregate": "krum:f=0"}, moves, TRAINED),
    Setting("inverse distances", {"aggregate": "ida"}, moves, TRAINED),
    Setting("angles of layers", {"aggregate": "l_dawa"}, moves, TRAINED),
    Setting("noise on the way up", {"channel": "awgn:20,way=up"}, moves, TRAINED),
    Setting("noise on the way down", {"channel": "awgn:20,way=down"}, moves, TRAINED),
    Setting("sums in the air", {"channel": "air:20"}, moves, TRAINED),
    Setting("topk", {"compress": "topk:0.1"}, shorter, "as many bytes come up"),
    Setting("qsgd", {"compress": "qsgd:4"}, shorter, "as many bytes come up"),
    Setting("faults", {"faults": "nan:0.2+lost:0.2+duplicate:0.2"}, counted, "none was counted"),
    Setting("the cache", {"cache": True}, saves, "results differ, or more bytes go down"),
    Setting(
        "an attack from round 2",
        {"attack": "sign_flip:0.5,from=2", "eval_every": 1},  # what round 1 left is looked at
        from_then_on,
        f"{TRAINED}, or round 1 is not",
    ),
    *(Setting(f"attack {name}", {"attack": f"{name}:0.5"}, moves, TRAINED) for name in attack.ATTACKS.own),
)
