"""What a data set is, once read: tensors, classes, what each column is used as, and which may name natural clients."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedloom.data.preprocessing import Preprocessing
from fedloom.errors import UsageError


@dataclass(frozen=True)
class Table:
    """The rows of one split.

    `x` is float32 `[N, C, H, W]` in [0, 1] for images, float32 `[N, D]` for tabular data, int64 `[N, L]` for text
    (0 = padding, 1 = unknown). `y` is int64 `[N]`, or float32 `[N]` where an amount is the target,
    and `[N, L]` where several labels are. `columns` has the
    raw values, `[N]` each, of the columns that may name natural clients: all columns of tabular data, else all but the
    features and the label. `metadata` are the columns that go with the rows beside x and y, `[N]` each. `strata`, int64
    `[N]`, stand for classes where y has none.
    """

    x: torch.Tensor
    y: torch.Tensor
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, torch.Tensor] = field(default_factory=dict)
    strata: torch.Tensor | None = None


@dataclass(frozen=True)
class Column:
    """What a column of the data is used as, and what is to be known of that, in words.

    `role` is label, client, series, time, metadata, number, category, date, text, image or ignored; `values` are the
    categories, or the words of a text beside other columns, in their order in x, `fill` is what a gap becomes there,
    and `written` how the strings of dates are written (`dates.WRITTEN`; none: as 2024-01-31).
    """

    name: str
    role: str
    note: str = ""
    values: tuple[str, ...] = ()
    fill: tuple[float, ...] = ()
    written: str = ""


FEATURES = ("number", "category", "date", "text", "image")  # the roles of what a network sees


@dataclass(frozen=True)
class Source:
    """A data set with its training and its test split. `kind` is "image", "tabular" or "text".

    `roles` say of every column what it is used as. `widths` are, for tabular data, how many columns of x each feature
    column of the file became. Where `fill` is mean or most_frequent, x may have NaN: gaps that are yet to be filled.
    `classes` are the names of the strata where y has no classes. `levels` are the values of each column of metadata
    that has names for them, in the order of its numbers. `labels` are the names of several labels a row. `told`
    says what data given in Python were (`data.given`). `preprocessing` is how its rows were read,
    without what is learned of dealt rows only. `decisions` are sentences on what was decided as they were read (None:
    they are the library's own, of which nothing is to be told). `test_share` is the share of rows that was asked to be
    held out (None: nothing was asked).
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    train: Table
    test: Table
    vocabulary: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    roles: tuple[Column, ...] = ()
    fill: str = ""
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    told: Mapping[str, Any] | None = None
    preprocessing: Preprocessing | None = None
    decisions: tuple[str, ...] | None = ()
    test_share: float | None = None

    @property
    def stratified(self) -> "Source":
        """The same with strata as labels, if it has some: what rules deal by that go class by class."""
        if self.train.strata is None or self.test.strata is None:
            return self
        train, test = replace(self.train, y=self.train.strata), replace(self.test, y=self.test.strata)
        return replace(self, train=train, test=test)


def require_columns(data: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError, listing the columns there are, unless all `names` are among the `known`."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UsageError(f"no column {name!r} in {data}; its columns are: {', '.join(known) or 'none'}")


def listed(values: Iterable[object], limit: int = 5) -> str:
    """The first values, quoted, for an error's one line: 'a', 'b' and 10 more."""
    values = list(values)
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(repr(str(value)) for value in values[:limit]) + more
