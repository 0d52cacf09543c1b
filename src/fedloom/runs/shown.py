"""What a run's folder shows of it: all that tables, pictures and pages are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedloom.runs.spec import Spec


class Shown(Protocol):
    """What is needed of a `Run`: what was asked, and what was measured."""

    @property
    def path(self) -> Path: ...

    @property
    def spec(self) -> Spec: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def partition(self) -> Mapping[str, Any]: ...

    @property
    def metrics(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def selected(self) -> Mapping[str, Any]: ...

    @property
    def clients(self) -> Mapping[str, Any]: ...

    @property
    def chosen_clients(self) -> Mapping[str, Any]: ...

    def lines(self, name: str) -> Iterator[Mapping[str, Any]]: ...

    def read_json(self, name: str) -> dict[str, Any]: ...
