"""Robust rules in place of the mean, by name; the folder is the registry, to which installed packages may add.

    krum:f=4                       one rule with its options; the first values may do without a name: krum:4
    nnm+krum:f=4                   replies are mixed with their nearest neighbours first; nnm takes krum's f
    bucketing:s=2+median           they are averaged in buckets of two first
    gas:p=1000+multi_krum:f=0.2    the rule only scores the replies, on random pieces

A rule is called with all replies of a round as rows of one tensor [K, D] and gives back one row.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

from fedloom.aggregators.rule import Context, Piece, Rule, Verdict, Wrapper, apply
from fedloom.errors import UsageError
from fedloom.members import Registry
from fedloom.parsing import bound, chain
from fedloom.sources import declared_by


def _folder() -> dict[str, type[Rule]]:
    found: dict[str, type[Rule]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem == "__init__":
            continue
        module = import_module(f"{__name__}.{path.stem}")
        for cls in vars(module).values():
            here = isinstance(cls, type) and issubclass(cls, Rule) and cls.__module__ == module.__name__
            if here and not inspect.isabstract(cls):
                found[cls.name()] = cls
    return found


RULES = Registry[type[Rule]]("aggregation rule", "fedloom.aggregators", _folder, Rule)


def options(name: str) -> list[tuple[str, str, str, str]]:
    """(name, type, default, comment) of every option of a rule."""
    return declared_by(RULES[name])


def build(text: str) -> Rule:
    """The rule that a text asks for: `median`, `nnm+krum:f=4`. Raises UsageError with what is wrong in it."""
    rule: Rule | None = None
    for term in reversed(chain(text)):
        name, cls = term.name, RULES[term.name]
        if issubclass(cls, Wrapper) == (rule is None):
            raise UsageError(
                f"{name} in {text!r} goes before a rule, as in {name}+median"
                if rule is None
                else f"{name} in {text!r} is a rule by itself; before another one stand only {', '.join(wrappers())}"
            )
        rule = cls(*([rule] if rule else []), **bound(term, cls, besides=("inner",)))
    assert rule is not None  # a text has at least one part
    return rule


def wrappers() -> list[str]:
    """The names that go before a rule."""
    return [name for name in RULES.own if issubclass(RULES[name], Wrapper)]


__all__ = ["RULES", "Context", "Piece", "Rule", "Verdict", "Wrapper", "apply", "build", "options", "wrappers"]
