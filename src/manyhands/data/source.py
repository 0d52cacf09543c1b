"""What a data set is, once read: tensors, classes, and the columns that may name natural clients."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from manyhands.errors import UsageError


@dataclass(frozen=True)
class Table:
    """The rows of one split.

    `x` is float32 `[N, C, H, W]` in [0, 1] for images, float32 `[N, D]` for tabular data, int64 `[N, L]` for text
    (0 = padding, 1 = unknown). `y` is int64 `[N]`. `columns` has the raw values, `[N]` each, of the columns that may
    name natural clients: all columns of tabular data, else all but the features and the label.
    """

    x: torch.Tensor
    y: torch.Tensor
    columns: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A data set with its training and its test split. `kind` is "image", "tabular" or "text".

    `widths` are, for tabular data, how many columns of x each feature column of the file became.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    train: Table
    test: Table
    vocabulary: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()


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
