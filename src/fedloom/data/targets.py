"""What a network learns to predict: one class of several, or an amount."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fedloom.data.arrow import is_string
from fedloom.data.labels import cast_label, encode_labels, label_column, refuse_amounts
from fedloom.data.roles import Wanted
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

MOST_STRATA = 10
ROWS_A_STRATUM = 10


@dataclass(frozen=True)
class Encoded:
    """Both splits' y and the names of the classes; where y has none, of the strata, which stand for them in dealing."""

    classes: tuple[str, ...]
    train: torch.Tensor
    test: torch.Tensor
    strata: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None)


class Target:
    """One class out of several: whole numbers, truth values or strings."""

    classes: ClassVar[bool] = True

    def column(self, data: str, names: list[str], label: str | None) -> str:
        """The column that is the target."""
        return label_column(data, names, label)

    def cast(self, data: str, table: pa.Table, wanted: Wanted) -> pa.Table:
        """A split whose target can be one; raises UsageError for what cannot."""
        return cast_label(data, table, wanted)

    def check(self, data: str, table: pa.Table, wanted: Wanted) -> None:
        """Raises UsageError for training rows whose target cannot be learned as this one."""
        refuse_amounts(data, table, wanted)

    def strata(self, table: pa.Table, label: str) -> np.ndarray | None:
        """What a held-out split has as much of as the rest, int64 [N]; None: of each value of the target."""
        return None

    def encode(self, data: str, train: pa.Table, test: pa.Table, label: str) -> Encoded:
        """Both splits' y."""
        return Encoded(*encode_labels(data, train, test, label))


class Amount(Target):
    """A number, in the unit that it has in the data. Its strata are tenths of the training rows, in its order."""

    classes = False

    def cast(self, data: str, table: pa.Table, wanted: Wanted) -> pa.Table:
        import pyarrow as pa

        label, kind = wanted.label, table.column(wanted.label).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            what = "text" if is_string(kind) else str(kind)
            raise UsageError(
                f"the target {label!r} of {data} is {what}; regression predicts a number: name the column that has it "
                "(label=NAME), or take problem=classification"
            )
        values = table.column(label).cast(pa.float64(), safe=False)
        if infinite := int(np.isinf(values.to_numpy()).sum()):
            raise UsageError(f"the target {label!r} of {data} is infinite in {infinite} rows; repair or drop them")
        return table.set_column(table.column_names.index(label), label, values)

    def check(self, data: str, table: pa.Table, wanted: Wanted) -> None:
        values = table.column(wanted.label).drop_null().to_numpy()
        if len(values) and values.min() == values.max():
            raise UsageError(
                f"the target {wanted.label!r} of {data} is {values[0]:g} in every training row: there is nothing to "
                "learn; name another column (label=NAME)"
            )

    def strata(self, table: pa.Table, label: str) -> np.ndarray | None:
        values = table.column(label).to_numpy()
        return np.searchsorted(_edges(values), values, side="right")

    def encode(self, data: str, train: pa.Table, test: pa.Table, label: str) -> Encoded:
        columns = [table.column(label).to_numpy() for table in (train, test)]
        edges = _edges(columns[0])
        strata = [torch.from_numpy(np.searchsorted(edges, column, side="right")) for column in columns]
        ends = [columns[0].min(), *edges, columns[0].max()]
        names = tuple(f"{low:.4g} to {high:.4g}" for low, high in pairwise(ends))
        y = [torch.from_numpy(column.astype(np.float32)) for column in columns]
        return Encoded(names, y[0], y[1], (strata[0], strata[1]))


def _edges(values: np.ndarray) -> np.ndarray:
    """Where the strata of amounts meet, ascending: at quantiles, each stratum with about as many rows."""
    count = min(MOST_STRATA, max(1, len(values) // ROWS_A_STRATUM))
    edges = np.unique(np.quantile(values, np.arange(1, count) / count))
    return edges[edges > values.min()]


TARGETS: dict[str, Target] = {"class": Target(), "amount": Amount()}
