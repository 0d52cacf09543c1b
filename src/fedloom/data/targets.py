"""What a network learns to predict: a class, an amount, several labels, a distribution over classes, or a mask."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fedloom.data.arrow import is_string
from fedloom.data.labels import cast_label, encode_labels, label_column, refuse_amounts
from fedloom.data.masks import IGNORED, mask_array
from fedloom.data.roles import Wanted
from fedloom.data.source import listed, require_columns
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

MOST_STRATA = 10
ROWS_A_STRATUM = 10
ROUNDED = 1e-3  # that the shares of a row may be off 1


@dataclass(frozen=True)
class Encoded:
    """Both splits' y and the names of the classes; where y has none, of the strata, which stand for them in dealing."""

    classes: tuple[str, ...]
    train: torch.Tensor
    test: torch.Tensor
    strata: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None)
    labels: tuple[str, ...] = ()  # the names of several labels a row, or of the classes of pixels
    told: tuple[str, ...] = ()  # what was decided, in sentences


class Target:
    """One class out of several: whole numbers, truth values or strings."""

    kind: ClassVar[str] = "class"

    def joined(self, data: str, table: pa.Table, label: str | None) -> pa.Table:
        """A split whose target is one column."""
        return table

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

    kind = "amount"

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


class Labels(Target):
    """Several labels a row, each 0 or 1: columns named `a,b,c`, or one column of rows of numbers.

    Its strata are the sets of labels that enough training rows have, and all others together.
    """

    kind = "labels"
    told = "several labels a row are columns of 0 and 1 (label=a,b,c), or one column of rows of 0 and 1"

    def joined(self, data: str, table: pa.Table, label: str | None) -> pa.Table:
        import pyarrow as pa

        names = _several(label)
        if len(names) < 2:
            return table
        require_columns(data, names, table.column_names)
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"label={label} names the column {twice[0]!r} twice; once is enough")
        block = np.stack([self.entries(data, name, table.column(name)) for name in names], axis=1)
        rest = table.drop_columns(names)
        return rest.append_column(",".join(names), pa.FixedShapeTensorArray.from_numpy_ndarray(block))

    def entries(self, data: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
        """One of several columns as float32 [N]; NaN where there is nothing."""
        return _bits(data, name, column)

    def column(self, data: str, names: list[str], label: str | None) -> str:
        return label_column(data, names, label and ",".join(_several(label)))

    def cast(self, data: str, table: pa.Table, wanted: Wanted) -> pa.Table:
        import pyarrow as pa

        kind = table.column(wanted.label).type
        if not isinstance(kind, pa.FixedShapeTensorType) or len(kind.shape) != 1 or kind.shape[0] < 2:
            raise UsageError(
                f"the label {wanted.label!r} of {data} is {kind}; {self.told}; with one class a row take "
                "problem=classification"
            )
        return table

    def check(self, data: str, table: pa.Table, wanted: Wanted) -> None:
        values = _rows(table, wanted.label)
        if not np.isin(values, (0, 1)).all():
            raise UsageError(f"the labels {wanted.label!r} of {data} hold other values than 0 and 1; make them so")
        names = self._names(wanted.label, values.shape[1])
        if alike := [name for name, column in zip(names, values.T, strict=True) if column.min() == column.max()]:
            raise UsageError(
                f"the label {listed(alike)} of {data} is the same in every training row: there is nothing to learn; "
                "leave it out"
            )

    def strata(self, table: pa.Table, label: str) -> np.ndarray | None:
        values = _rows(table, label)
        return _in_sets(values, _sets(values))

    def encode(self, data: str, train: pa.Table, test: pa.Table, label: str) -> Encoded:
        values = [_rows(table, label) for table in (train, test)]
        sets, names = _sets(values[0]), self._names(label, values[0].shape[1])
        told = ["+".join(name for name, there in zip(names, one, strict=True) if there) or "none" for one in sets]
        strata = [torch.from_numpy(_in_sets(part, sets)) for part in values]
        y = [torch.from_numpy(part.astype(np.float32)) for part in values]
        return Encoded((*told, "other sets"), y[0], y[1], (strata[0], strata[1]), names)

    def _names(self, label: str, count: int) -> tuple[str, ...]:
        named = _several(label)
        return tuple(named) if len(named) == count else tuple(f"{label} {place}" for place in range(count))


class Shares(Labels):
    """A distribution over classes a row: columns of shares named `a,b,c`, or one column of rows of them.

    Its strata are the classes with the largest share.
    """

    kind = "shares"
    told = "distributions are columns of shares (label=a,b,c), or one column of rows of them"

    def entries(self, data: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
        words = [None if value is None else str(value).strip() for value in column.to_pylist()]
        try:
            return np.array([float(word) if word else np.nan for word in words], dtype=np.float32)
        except ValueError as error:
            raise UsageError(
                f"the label {name!r} of {data} holds no numbers ({error}); a share is one from 0 to 1"
            ) from None

    def check(self, data: str, table: pa.Table, wanted: Wanted) -> None:
        values = _rows(table, wanted.label)
        sound(data, wanted.label, values)
        if (values == values[:1]).all():
            raise UsageError(
                f"the label {wanted.label!r} of {data} is the same in every training row: there is nothing to learn"
            )

    def strata(self, table: pa.Table, label: str) -> np.ndarray | None:
        return _largest(_rows(table, label))

    def encode(self, data: str, train: pa.Table, test: pa.Table, label: str) -> Encoded:
        values = [_rows(table, label) for table in (train, test)]
        sound(data, label, values[1])
        names = self._names(label, values[0].shape[1])
        strata = [torch.from_numpy(_largest(part)) for part in values]
        y = [torch.from_numpy((part / part.sum(axis=1, keepdims=True)).astype(np.float32)) for part in values]
        return Encoded(names, y[0], y[1], (strata[0], strata[1]), names)


def sound(data: str, label: str, values: np.ndarray) -> None:
    """Raises UsageError for rows that are no distributions."""
    wrong = ((values < 0).any(axis=1) | (np.abs(values.sum(axis=1) - 1) > ROUNDED)).sum()
    if wrong:
        raise UsageError(
            f"the label {label!r} of {data} is no distribution in {wrong} of {len(values)} rows: shares are at least "
            "0, and those of a row sum to 1; divide them by their sum, or take problem=multilabel for labels of 0 and 1"
        )


def _largest(values: np.ndarray) -> np.ndarray:
    """The class with the largest share, int64 [N]; those that one row alone has count as the commonest."""
    place = values.argmax(axis=1).astype(np.int64)
    counts = np.bincount(place, minlength=values.shape[1])
    return np.where(counts[place] == 1, counts.argmax(), place)


class Mask(Target):
    """A class for each pixel: masks as arrays or image files. Its classes are the values that training masks hold.

    0 and 255 alone are the classes 0 and 1; beside other values 255 is ignored. Its strata are the class that most
    pixels of a mask have, the first class (as a rule the background) only where there is no other.
    """

    kind = "mask"

    def column(self, data: str, names: list[str], label: str | None) -> str:
        usual = [name for name in ("mask", "masks") if name in names]
        return usual[0] if usual and label is None else label_column(data, names, label)

    def cast(self, data: str, table: pa.Table, wanted: Wanted) -> pa.Table:
        import pyarrow as pa

        place, column = table.column_names.index(wanted.label), table.column(wanted.label)
        pixels = mask_array(data, wanted.label, column, wanted.size)
        return table.set_column(place, wanted.label, pa.FixedShapeTensorArray.from_numpy_ndarray(pixels))

    def check(self, data: str, table: pa.Table, wanted: Wanted) -> None:
        values = _mask_values(_masks(table, wanted.label))
        if len(values) < 2:
            raise UsageError(
                f"the masks {wanted.label!r} of {data} have one class only, {listed(values)}, in every training row: "
                "there is nothing to learn"
            )

    def strata(self, table: pa.Table, label: str) -> np.ndarray | None:
        masks = _masks(table, label)
        return _foremost(masks, _mask_values(masks))

    def encode(self, data: str, train: pa.Table, test: pa.Table, label: str) -> Encoded:
        masks = [_masks(table, label) for table in (train, test)]
        every = np.unique(np.concatenate([np.unique(part) for part in masks]))
        binary, ignoring = every.tolist() == [0, IGNORED], len(every) > 2 and IGNORED in every
        values = [value for value in np.unique(masks[0]).tolist() if not (ignoring and value == IGNORED)]
        strange = [value for value in every.tolist() if value not in values and not (ignoring and value == IGNORED)]
        if strange and not binary:
            raise UsageError(
                f"the masks {label!r} of {data} have class {listed(strange)} in the test split but not in the training "
                "split; drop these rows or add training rows"
            )
        names = ("0", "1") if binary else tuple(map(str, values))
        told = [f"masks have the classes {listed(names)}"]
        if binary:
            told = [f"masks hold 0 and {IGNORED} alone, which are the classes 0 and 1"]
        if ignoring:
            told.append(f"pixels of masks that are {IGNORED} have no class, and count nowhere")
        told.append(f"a mask is dealt by the class that most of its pixels have, {names[0]} only if it has no other")
        foremost = [_foremost(part, values) for part in masks]
        there, counts = np.unique(foremost[0], return_counts=True)
        most = there[counts.argmax()]  # stands for what test masks alone have
        strata = [np.searchsorted(there, np.where(np.isin(part, there), part, most)) for part in foremost]
        number = np.full(IGNORED + 1, IGNORED, dtype=np.uint8)
        number[values] = np.arange(len(values))
        y = [torch.from_numpy(number[part]) for part in masks]
        dealt = tuple(names[place] for place in there)
        pair = torch.from_numpy(strata[0]), torch.from_numpy(strata[1])
        return Encoded(dealt, y[0], y[1], pair, names, tuple(told))


def _masks(table: pa.Table, label: str) -> np.ndarray:
    """The masks of a split, uint8 [N, H, W]."""
    found: np.ndarray = table.column(label).combine_chunks().to_numpy_ndarray()
    return found


def _mask_values(masks: np.ndarray) -> list[int]:
    """The values that are classes, ascending."""
    values: list[int] = np.unique(masks).tolist()
    return [value for value in values if value != IGNORED or len(values) <= 2]


def _foremost(masks: np.ndarray, values: list[int]) -> np.ndarray:
    """The place among `values` of the class that most pixels of each mask have but for the first, int64 [N]."""
    counts = np.stack([np.bincount(mask.ravel(), minlength=IGNORED + 1)[values] for mask in masks])
    counts[:, 0] = counts[:, 1:].sum(axis=1) == 0
    return _largest(counts)


def _several(label: str | None) -> list[str]:
    return [name.strip() for name in (label or "").split(",") if name.strip()]


TRUE, FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


def _bits(data: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of 0 and 1, or true and false, as float32 [N]; NaN where there is nothing."""
    words = [None if value is None else str(value).strip().lower() for value in column.to_pylist()]
    if wrong := sorted({word for word in words if word and word not in (*TRUE, *FALSE)}):
        raise UsageError(f"the label {name!r} of {data} holds {listed(wrong, 3)}; each of several labels is 0 or 1")
    return np.array([float(word in TRUE) if word else np.nan for word in words], dtype=np.float32)


def _rows(table: pa.Table, label: str) -> np.ndarray:
    """The labels of a split, [N, L], of rows that have all of them."""
    values: np.ndarray = table.column(label).combine_chunks().to_numpy_ndarray()
    return values[~np.isnan(values).any(axis=1)]


def _sets(values: np.ndarray) -> np.ndarray:
    """The sets of labels that most rows have, [S, L], the commonest first: none that only few have."""
    found, counts = np.unique(values, axis=0, return_counts=True)
    order = [place for place in np.argsort(-counts, kind="stable") if counts[place] >= ROWS_A_STRATUM]
    return found[order[: MOST_STRATA - 1]]


def _in_sets(values: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Which of some sets each row has, int64 [N]; of others the next number, if there are at least two such rows."""
    same = (values[:, None] == sets[None]).all(axis=2)
    place = np.where(same.any(axis=1), same.argmax(axis=1), len(sets)).astype(np.int64)
    return np.where(place == len(sets), 0, place) if (place == len(sets)).sum() == 1 and len(sets) else place


TARGETS: dict[str, Target] = {one.kind: one for one in (Target(), Amount(), Labels(), Shares(), Mask())}
