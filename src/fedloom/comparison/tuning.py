"""The same number of trials for every method, judged on validation data, at a seed that no reported cell has.

A trial is an ordinary run without test data (`blind`), in a folder of its own while it goes on; what it tried and what
came out is a line of `trials.jsonl`, and its rounds stay in its folder. The first trial has the method's defaults, the
next come from Optuna's TPE sampler. Every trial's sampler has a keyed seed and sees the trials before it, so the search
is the same however many processes there are and however often it is killed.

No trial reads a test row of its own seed. Where the data have a test split of their own (cifar10), that is no test row
of any cell either. Where each seed draws its test rows out of one table (digits), rows that trials learn from and are
judged on can be test rows of a cell at another seed: fields are then chosen with a glimpse of them, for all alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.comparison import trials
from fedloom.comparison.grid import Comparison
from fedloom.comparison.reading import fields_of, given_fields
from fedloom.errors import UsageError
from fedloom.fields import coerced
from fedloom.random import seed_of
from fedloom.ranges import hints_of
from fedloom.runs.spec import Spec

SCALES = ("log", "linear")


def space(comparison: Comparison, method: str) -> dict[str, tuple[Any, ...]]:
    """Where each field that is searched is looked for: the method's ranges, without the fields that were given.

    Those of a method that it wraps are among them: `inner.lr`.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for prefix, kind, given in comparison.inside(method):
        own = {name: tuple(r) for name, r in comparison.ranges.items() if name in fields_of(kind)}
        ranges = kind.search_space() | own
        found |= {prefix + name: r for name, r in ranges.items() if name not in given_fields(given)}
    for name, r in found.items():
        _checked(f"the range of {method}.{name}", r)
    return found


def trial(comparison: Comparison, out: Path, setting: str, method: str) -> tuple[int, Spec] | None:
    """The number and the spec of the next trial; None when there are enough, or nothing to search."""
    past = trials.finished_trials(out, setting, method)
    where = space(comparison, method)
    if len(past) >= comparison.tune or not where:
        return None
    seed = comparison.trial_seed
    fields = _suggested(where, past, seed_of(seed, "tuning", len(past)), _fields(comparison, method))
    spec = comparison.spec(setting, method, seed, fields)
    return len(past), dataclasses.replace(spec, blind=True, track=None)


def _fields(comparison: Comparison, method: str) -> dict[str, tuple[Any, Any]]:
    """The default and the type of each field of a method, and of those that it wraps."""
    return {
        prefix + f.name: (f.default, hints_of(kind)[f.name].type)
        for prefix, kind, _ in comparison.inside(method)
        for f in dataclasses.fields(kind)
    }


def _checked(where: str, r: Sequence[Any]) -> None:
    if len(r) == 3 and r[2] in SCALES:
        low, high = (coerced(where, one, float) for one in r[:2])
        if not low < high or (r[2] == "log" and low <= 0):
            raise UsageError(f"{where} is {list(r)}; it must go up, and begin above 0 on a log scale")
    elif not r:
        raise UsageError(f"{where} is empty; give [low, high, log], [low, high, linear], or choices")


def _suggested(
    where: Mapping[str, tuple[Any, ...]],
    past: Sequence[Mapping[str, Any]],
    seed: int,
    fields: Mapping[str, tuple[Any, Any]],
) -> dict[str, Any]:
    """What to try next, by field; the first trial has the defaults."""
    if not past:
        return {name: default for name, (default, _) in fields.items() if name in where}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    wholes = {name for name, (_, kind) in fields.items() if kind is int}
    spaces: dict[str, Any] = {}
    for name, r in where.items():
        if len(r) == 3 and r[2] in SCALES:
            made = optuna.distributions.IntDistribution if name in wholes else optuna.distributions.FloatDistribution
            spaces[name] = made(*r[:2], log=r[2] == "log")
        else:
            spaces[name] = optuna.distributions.CategoricalDistribution(r)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**32))
    for one in past:
        fields, score = one["fields"], trials.score_of(one)
        if score is not None and all(name in fields and _inside(fields[name], spaces[name]) for name in spaces):
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: fields[name] for name in spaces}, distributions=spaces, value=score
                )
            )
    params: dict[str, Any] = study.ask(spaces).params
    return params


def _inside(value: Any, space: Any) -> bool:
    """Whether the sampler can take in a value; a default may be null, or lie outside of what is searched."""
    if hasattr(space, "choices"):
        return value in space.choices
    return value is not None and bool(space.low <= value <= space.high)


def require() -> None:
    """Raises UsageError if the sampler is not installed."""
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise UsageError("tuning needs the extra: pip install 'fedloom[tune]'")
