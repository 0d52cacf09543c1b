"""What settings can name: the library's own members, and those that installed packages add by entry points.

A package adds a rule by two lines of its pyproject.toml, and settings name it as any other:

    [project.entry-points."fedloom.aggregators"]
    my_rule = "my_package.rules:MyRule"

Nothing is imported before it is asked for: listing names reads the packages' metadata alone, and a package that cannot
be imported stops nobody who does not ask for its members.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import distributions, entry_points
from typing import Any, Generic, TypeVar

from fedloom.errors import UsageError, unknown

log = logging.getLogger("fedloom.members")

T = TypeVar("T")
Own = Mapping[str, T | str]  # members by name: as they are, or as the place `module:attribute` where they are


@dataclass(frozen=True)
class Offer:
    """A member that an installed package adds: its entry point `name = "module:attribute"` in a group."""

    group: str
    name: str
    module: str
    attribute: str
    package: str  # with its version, where it has one

    def __str__(self) -> str:
        point = f"{self.name} = {self.module}:{self.attribute}"
        return f"the package {self.package} (entry point {point} in {self.group})"

    def load(self) -> Any:
        """What it names, imported. Raises UsageError where that fails."""
        try:
            return _found(self.module, self.attribute)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise UsageError(f"cannot load {self}: {why}; repair that package, or uninstall it") from error


class Registry(Mapping[str, T], Generic[T]):
    """The members of one kind by name: `registry[name]` imports one, or says which name is near.

    `kind` is what errors call a member, `group` the entry points that add some. `own` are the library's, or a function
    that gives them when first asked. What a package adds derives from `base`; without one it is a function.

    Where a package's member has a name of the library, the library's stands and the log says so; a name that two
    packages add is refused.
    """

    def __init__(self, kind: str, group: str, own: Own[T] | Callable[[], Own[T]], base: type | None = None) -> None:
        self.kind, self.group, self.base = kind, group, base
        self._own = own

    @cached_property
    def own(self) -> Own[T]:
        """The library's members."""
        return self._own() if callable(self._own) else self._own

    @property
    def added(self) -> Mapping[str, tuple[Offer, ...]]:
        """What packages add, by name, without what has a name of the library."""
        return {name: offers for name, offers in offered(self.group).items() if name not in self.own}

    def __iter__(self) -> Iterator[str]:
        return iter((*self.own, *self.added))

    def __len__(self) -> int:
        return len(self.own) + len(self.added)

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.added

    def __getitem__(self, name: str) -> T:
        if name in self.own:
            for offer in offered(self.group).get(name, ()):
                _refuse(offer, f"the library has the {self.kind} {name} itself")
            member = self.own[name]
            return _found(*member.split(":")) if isinstance(member, str) else member
        added: T = self.taken(self.offer(name))
        return added

    def offer(self, name: str) -> Offer:
        """The package's entry point that adds a member; UsageError if there is none, or more than one."""
        offers = self.added.get(name, ())
        if not offers:
            raise unknown(self.kind, name, self)
        if len(offers) > 1:
            raise UsageError(f"the {self.kind} {name} is added by {' and by '.join(map(str, offers))}; uninstall one")
        return offers[0]

    def taken(self, offer: Offer, base: type | None = None) -> Any:
        """What an offer names, imported; UsageError if it is not of this kind."""
        base, member = base or self.base, offer.load()
        if base is None:
            right, wanted = callable(member), "a function"
        else:
            right = isinstance(member, type) and issubclass(member, base) and not inspect.isabstract(member)
            wanted = f"a class that derives from {base.__name__}, without abstract functions"
        if not right:
            raise UsageError(f"the {self.kind} {offer.name} of {offer} is {member!r}; it must be {wanted}")
        if self.base is not None and hasattr(member, "name") and member.name() != offer.name:
            raise UsageError(
                f"the {self.kind} {offer.name} of {offer} calls itself {member.name()}; give the entry point that name"
            )
        return member


@cache
def offered(group: str) -> Mapping[str, tuple[Offer, ...]]:
    """What installed packages add to a group, by name."""
    found: dict[str, tuple[Offer, ...]] = {}
    for point in entry_points(group=group):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "?"
        offer = Offer(group, point.name, point.module, point.attr, package)
        if re.fullmatch(r"\w[\w.-]*", point.name):
            found[point.name] = (*found.get(point.name, ()), offer)
        else:
            _refuse(offer, "a name has letters, digits, underscores, dots and hyphens")
    return found


@cache
def packages() -> tuple[str, ...]:
    """The installed packages that add members, with their versions."""
    found = (one for one in distributions() if any(point.group.startswith("fedloom.") for point in one.entry_points))
    return tuple(sorted({f"{one.name} {one.version}" for one in found}))


@cache
def _refuse(offer: Offer, why: str) -> None:
    """Says once what is not taken."""
    log.warning("not taken is %s: %s", offer, why)


def _found(module: str, attribute: str) -> Any:
    found: Any = import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found
