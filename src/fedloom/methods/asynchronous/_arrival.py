"""Groups of clients whose work is to end at one moment: FedCompass's schedule, as plain values of messages.

A plan has `groups` by number (`due` and `latest` in seconds of the clock, `members` at work, who has `arrived`), each
client's measured `speed` (seconds a step), the `jobs` under way, and how many groups were `founded`.
"""

from __future__ import annotations

from math import floor, inf
from typing import Any

Plan = dict[str, Any]


def left_by(plan: Plan, k: int) -> int | None:
    """The group that is complete now that client k has ended its work, if one is."""
    name: int = plan["jobs"].pop(k)["group"]
    group = plan["groups"][name]
    group["members"].remove(k)
    if not group["members"] and not group["arrived"]:
        del plan["groups"][name]
        return None
    return None if group["members"] else name


def assigned(plan: Plan, k: int, now: float, fewest: int, most: int, latest: float) -> tuple[int, int]:
    """A client's steps and its group: the one that leaves it the most steps, or a new one near another's end.

    Steps are from `fewest` to `most`; a new group's last moment is `latest` times as far away as its due one.
    """
    groups, speed, known = plan["groups"], plan["speed"], plan["speed"].get(k, inf)
    left = {g: whole((group["due"] - now) / known) for g, group in groups.items() if group["due"] < inf}
    left = {g: steps for g, steps in left.items() if fewest <= steps <= most}
    if left:
        name = max(left, key=lambda g: (left[g], g))
        groups[name]["members"].append(k)
        return left[name], name
    others = [group for group in groups.values() if now < group["latest"] < inf]
    # When the fastest member of another group will have done its most once more, that one can join this one.
    ends = [group["latest"] + most * min(speed[m] for m in group["members"] + group["arrived"]) for group in others]
    fitting = [steps for steps in (whole((end - now) / known) for end in ends) if steps <= most]
    steps = max(fewest, max(fitting, default=most)) if known < inf else most
    name, plan["founded"] = plan["founded"], plan["founded"] + 1
    due = {"due": now + steps * known, "latest": now + latest * steps * known}
    groups[name] = {**due, "members": [k], "arrived": []}
    return steps, name


def whole(number: float) -> int:
    """Rounded down, but for what rounding has taken from a whole number."""
    return floor(number + 1e-6)
