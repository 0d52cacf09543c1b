"""What a client remembers between calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING

from fedloom import encoding

if TYPE_CHECKING:
    from fedloom.message import Value
    from fedloom.site import Site


class State(MutableMapping[str, "Value"]):
    """What a client remembers between calls: message values by name, committed when its function returns."""

    def __init__(self, site: Site, committed: Mapping[str, Value]) -> None:
        self.site = site
        self.values_: dict[str, Value] = dict(committed)
        self.changed = False

    def __getitem__(self, name: str) -> Value:
        return self.values_[name]

    def __setitem__(self, name: str, value: Value) -> None:
        encoding.check({name: value}, "client.state")
        self.values_[name] = self.site.to_device(value)
        self.changed = True

    def __delitem__(self, name: str) -> None:
        del self.values_[name]
        self.changed = True

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)
