"""Who misbehaves, and how: `sign_flip:0.2`, or several kinds on disjoint shares, `label_flip:0.2+alie:0.1,z=1.5`.

An attack wraps the malicious clients in one of three places: on their data, inside their function, on their reply, in
rounds and in a method's `finish`; in `setup` and evaluation they are honest.
Methods know nothing of it. Who is malicious depends on the seed alone; when, on `from` and `until`.

An attack of one's own is a class derived from `Part` in a file: `my_attack.py:0.2`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.boundary.attack import chameleon, collusion, data, inside, reply
from fedloom.boundary.attack.attack import Attack
from fedloom.boundary.attack.collusion import Colluding, Collusion, Nan, Poisoned
from fedloom.boundary.attack.numbers import Updates
from fedloom.boundary.attack.part import Part, kind_in
from fedloom.errors import UsageError
from fedloom.members import Registry
from fedloom.parsing import Term, bound, chain

if TYPE_CHECKING:
    from fedloom.boundary.stage import Stage
    from fedloom.task import Task


def _kinds() -> dict[str, type[Part]]:
    made = (data.LabelFlip, data.FeatureNoise, data.Backdoor, inside.ModelReplacement, chameleon.Chameleon)
    sent = (reply.SignFlip, reply.Gaussian, reply.Zero, reply.FreeRider, collusion.Nan)
    agreed = (collusion.Alie, collusion.Ipm, collusion.Mimic, collusion.Dmpa)
    return {kind.name(): kind for kind in (*made, *sent, *agreed)}


ATTACKS = Registry[type[Part]]("attack", "fedloom.attacks", _kinds, Part)


def build(text: str, task: Task, seed: int, updates: Updates | None = None, rounds: int | None = None) -> Attack:
    """What a text asks for in a run of so many rounds; raises UsageError for what is wrong in it, or with this task."""
    parts = tuple(part(term.text).fit(task) for term in chain(text))
    attack = Attack(parts, task.population, seed, updates or Updates())
    total = sum(part.count(task.population) for part in attack.parts)
    if total > task.population:
        raise UsageError(f"attack={text} needs {total} clients, and there are {task.population}")
    for one in attack.parts:
        if rounds is not None and one.from_ > rounds:
            raise UsageError(f"attack={text}: {one.name()} begins in round {one.from_}, and the run has {rounds}")
        if one.reverses and attack.updates.kept:
            raise UsageError(
                f"attack={text}: {one.name()} reverses updates, and those of {attack.updates.kept[0]!r} begin from "
                "what lies in each client's state, where colluders do not see it; take sign_flip, or alie"
            )
    return attack


def on_the_way(attack: Attack) -> list[Stage]:
    """What attackers do behind the clients: those that need others' replies, or send what no client can."""
    found: list[Stage] = []
    for one in attack.parts:
        if isinstance(one, Colluding):
            found.append(Collusion(attack, one))
        elif isinstance(one, Nan):
            found.append(Poisoned(attack, one))
    return found


def part(text: str) -> Part:
    """One kind of attacker from its text."""
    term = Term(text)
    kind = kind_in(term.name) if term.name.endswith(".py") else ATTACKS[term.name]
    given = bound(term, kind, besides=kind.hidden)
    if "share" not in given:
        raise UsageError(f"{term.name} needs the share of the clients that are such: {term.name}:0.2")
    return kind(**given)


__all__ = ["ATTACKS", "Attack", "Part", "build", "on_the_way", "part"]
