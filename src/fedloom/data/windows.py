"""Series cut into windows: of each client's rows, in their order, so that no window spans two series or two splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedloom.data import dates
from fedloom.data.arrow import is_string, raw_values
from fedloom.data.files import Windows
from fedloom.data.shards import Shards
from fedloom.data.source import listed
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


TOLD = {"train": "training"}  # splits in words


@dataclass(frozen=True)
class Series:
    """Which series the rows of both splits are of, int64 [N], where a client has several, and the names of all."""

    of_row: Tensor
    names: tuple[str, ...]

    @staticmethod
    def of(windows: Windows, *splits: Mapping[str, np.ndarray]) -> Series | None:
        """Those that a column of the splits names; None where a client's rows are one series."""
        if not windows.series:
            return None
        values = np.concatenate([columns[windows.series] for columns in splits])
        names, place = np.unique(values, return_inverse=True)
        return Series(torch.from_numpy(place.astype(np.int64)), tuple(map(str, names.tolist())))

    def parts(self, owner: Tensor) -> Tensor:
        """The number of each training row's series among those of all clients, int64 [n]; -1 for nobody's rows."""
        both = owner * len(self.names) + self.of_row[: len(owner)]
        return torch.unique(both, return_inverse=True)[1].where(owner >= 0, -1)

    def within(self, rows: Tensor) -> list[tuple[str, Tensor]]:
        """A client's rows, series by series, with the name of each."""
        order = self.of_row[rows].argsort(stable=True)
        there, counts = torch.unique_consecutive(self.of_row[rows[order]], return_counts=True)
        pieces = rows[order].split(counts.tolist())
        return [(self.names[number], piece) for number, piece in zip(there.tolist(), pieces, strict=True)]


def check_sequence(data: str, table: pa.Table, windows: Windows) -> None:
    """Raises UsageError where a column can neither tell series apart nor sort their rows, whatever its gaps are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if windows.series and not (pa.types.is_primitive(kind := table.column(windows.series).type) or is_string(kind)):
        raise UsageError(
            f"windows: series={windows.series}: that column of {data} is {kind}; expected names or numbers"
        )
    if not windows.time:
        return
    column, kind = table.column(windows.time), table.column(windows.time).type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not (number or dates.is_date(kind)):
        some = f"holds {listed(column.drop_null().unique().to_pylist(), 3)}" if is_string(kind) else f"is {kind}"
        raise UsageError(
            f"windows: time={windows.time}: that column of {data} {some}; rows are sorted by numbers, or by dates such "
            "as 2024-01-31"
        )
    if pa.types.is_floating(kind) and pc.any(pc.is_inf(column)).as_py():
        raise UsageError(f"windows: time={windows.time}: that column of {data} has infinite values; repair them")


def in_order(where: str, table: pa.Table, client: str | None, windows: Windows) -> pa.Table:
    """The rows client by client and series by series, each in the order of its times; as they are without a time."""
    _refuse_gaps(where, table, windows)
    if not windows.time or client is None:  # rows of no client are refused where they are held out or dealt
        return table
    return table.take(_by_time(where, table, windows, _numbered(table, client, windows.series)))


def _refuse_gaps(where: str, table: pa.Table, windows: Windows) -> None:
    import pyarrow.compute as pc

    for option, name in (("series", windows.series), ("time", windows.time)):
        gaps = name and pc.sum(pc.is_null(table.column(name), nan_is_null=True)).as_py()
        if gaps:
            raise UsageError(
                f"windows: {option}={name}: {where} has {gaps} rows without a value there, which have no place in a "
                "series; repair them, or leave those rows out"
            )


def _numbered(table: pa.Table, *columns: str | None) -> np.ndarray:
    """A number for each combination of the columns' values, int64 [N], in their order."""
    codes = np.zeros(table.num_rows, dtype=np.int64)
    for name in filter(None, columns):
        values, place = np.unique(raw_values(table.column(name)), return_inverse=True)
        codes = np.unique(codes * len(values) + place, return_inverse=True)[1]
    return codes


def _by_time(where: str, table: pa.Table, windows: Windows, part: np.ndarray) -> np.ndarray:
    """The places of rows, int64 [N], part by part and by their times; raises UsageError for two of one time."""
    import pyarrow.compute as pc

    column = table.column(windows.time)
    time = pc.rank(column, tiebreaker="dense").to_numpy().astype(np.int64)
    order = np.lexsort((time, part))
    same = (np.diff(part[order]) == 0) & (np.diff(time[order]) == 0)
    if same.any():
        first = column[int(order[same.argmax()])].as_py()
        apart = "" if windows.series else "name the column that tells series apart (series=NAME), "
        raise UsageError(
            f"windows: time={windows.time}: {where} has {int(same.sum())} rows of the same time as another of their "
            f"series, such as {first}, and nothing says which is first; {apart}keep one row a time, or leave time out, "
            "and rows are in the order in which they stand"
        )
    return order


def told_of_time(train: pa.Table, test: pa.Table, client: str | None, windows: Windows) -> list[str]:
    """What is to be told where test rows that data bring are not later than the training rows of their series."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not windows.time:
        return []
    columns = [*filter(None, dict.fromkeys((client, windows.series, windows.time)))]
    table = pa.concat_tables([train.select(columns), test.select(columns)])
    part = _numbered(table, client, windows.series)
    time = pc.rank(table.column(windows.time), tiebreaker="dense").to_numpy().astype(np.int64)
    latest, first = np.full(part.max() + 1, -1), np.full(part.max() + 1, len(time) + 1)
    np.maximum.at(latest, part[: len(train)], time[: len(train)])
    np.minimum.at(first, part[len(train) :], time[len(train) :])
    several, early = int(((latest >= 0) & (first <= len(time))).sum()), int((latest >= first).sum())
    if not early:
        return []
    return [
        f"in {early} of {several} series the test split begins before the last training row: tests are of the past, too"
    ]


def hold_last_out(
    data: str, table: pa.Table, client: str | None, share: float, series: str = ""
) -> tuple[pa.Table, pa.Table]:
    """The first rows of each client, or of each of its series, and the last `share` of them as its test rows."""
    import pyarrow as pa

    if client is None:
        raise UsageError(
            f"windows are cut of each client's rows in their order, and the partition deals the rows of {data} singly; "
            "set partition=column:NAME, of a column that names the clients"
        )
    owner = torch.from_numpy(_numbered(table, client, series).astype(np.int64))
    left = from_the_end(owner, int(owner.max()) + 1)
    sizes = torch.bincount(owner)
    held = (left < (sizes * share).round()[owner]).numpy()
    return table.filter(pa.array(~held)), table.filter(pa.array(held))


def from_the_end(owner: Tensor, clients: int) -> Tensor:
    """How many rows of its client stand behind each row, int64 [N]; -1 for nobody's rows."""
    shards = Shards.from_owner(owner, clients)
    behind = torch.full_like(owner, -1)
    last = shards.offsets[1:].repeat_interleave(shards.sizes)
    behind[shards.rows] = last - 1 - torch.arange(len(shards.rows))
    return behind


def starts(rows: int, windows: Windows) -> Tensor:
    """Where windows begin among so many rows, int64 [M]: each has its target among them, too."""
    return torch.arange(0, max(0, rows - windows.length - windows.horizon + 1), windows.stride)


def cut(
    dealt: Mapping[str, Shards], names: Sequence[str], windows: Windows, series: Series | None = None
) -> tuple[Tensor, dict[str, Shards], tuple[str, ...]]:
    """The rows of each window and of what comes after it up to its target [M, length + horizon], and whose they are.

    `dealt` are the splits, `names` the clients'. Windows are numbered split by split, client by client, series by
    series. Beside them is what is to be told. Raises UsageError where a client's training rows, or all test rows, are
    too few for a window.
    """
    shards: dict[str, Shards] = {}
    found: list[Tensor] = []
    told: list[str] = []
    reach, made = windows.length + windows.horizon, 0
    for split, rows_of in dealt.items():
        sizes, short, several = [], list[str](), 0
        for client in range(len(rows_of)):
            rows = rows_of[client]
            pieces = series.within(rows) if series else [("", rows)]
            here = 0
            for name, piece in pieces:
                first = starts(len(piece), windows)
                found.append(piece[first[:, None] + torch.arange(reach)])
                here += len(first)
                short += [] if len(first) else [f"{name} of {names[client]}"]
            if not here and split == "train":
                rows_told = f"{len(rows)} training rows" + (f" in {len(pieces)} series" if series else "")
                raise UsageError(
                    f"client {names[client]} has {rows_told}, too few for a window, which with its "
                    f"target has {reach}; take shorter ones, or leave that client's rows out"
                )
            sizes.append(here)
            several += len(pieces)
        if series and short and sum(sizes):
            told.append(
                f"{len(short)} of {several} series have too few {TOLD.get(split, split)} rows for a window, which with "
                f"its target has {reach}, and leave none: {listed(short)}"
            )
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        shards[split] = Shards(made + torch.arange(int(offsets[-1])), offsets)
        made += int(offsets[-1])
    if not len(shards["test"].rows):
        raise UsageError(
            f"no client has enough test rows for a window, which with its target has {reach}; take shorter ones, or "
            "give test rows in a file of their own"
        )
    nothing = "no client has enough validation rows for a window: rounds are chosen by nothing"
    return torch.cat(found), shards, (*told, *([] if len(shards["validation"].rows) else [nothing]))


def as_channels(data: str, x: Tensor) -> Tensor:
    """Windows [N, 1, T, C], as arrays are read, as [N, C, T, 1]: their columns are scaled as channels are."""
    if x.shape[1] != 1:
        raise UsageError(f"windows=given takes arrays [T, C] a row, got {list(x.shape[1:])} of {data}")
    return x.permute(0, 3, 2, 1)


def from_channels(x: Tensor) -> Tensor:
    """Windows [N, T, C] again."""
    return x.squeeze(3).transpose(1, 2).contiguous()


def unfolded(x: Tensor, windows: Windows, where: str) -> Tensor:
    """All windows [N - length + 1, length, D] of rows [N, D] in their order."""
    if len(x) < windows.length:
        raise UsageError(
            f"{where} has {len(x)} rows, and the model reads windows of {windows.length}: give as many rows of one "
            "series, in their order"
        )
    return x.unfold(0, windows.length, 1).transpose(1, 2)


def among_series(x: Tensor, windows: Windows, where: str, rows: pa.Table, told: list[str]) -> Tensor:
    """The window [N, length, D] that ends at each of the rows x [N, D]; NaN where too few of its series precede it."""
    order, part = in_series(where, rows, windows)
    sizes = torch.bincount(part)
    found = x.new_full((len(x), windows.length, x.shape[1]), torch.nan)
    for piece in order.split(sizes.tolist()):
        if len(piece) >= windows.length:
            places = piece.unfold(0, windows.length, 1)
            found[places[:, -1]] = x[places]
    short = int((sizes < windows.length).sum())
    if short == len(sizes):
        raise UsageError(
            f"{where} has {len(x)} rows in {short} series, none of which has as many as the windows of "
            f"{windows.length} that the model reads; give more rows of a series"
        )
    if short:
        told.append(
            f"{where}: {short} of {len(sizes)} series have fewer rows than the {windows.length} of a window, and no "
            "predictions"
        )
    return found


def in_series(where: str, rows: pa.Table, windows: Windows) -> tuple[Tensor, Tensor]:
    """One client's rows series by series, in the order of their times: their places, and the number of each's series.

    Both int64 [N].
    """
    _refuse_gaps(where, rows, windows)
    part = _numbered(rows, windows.series)
    order = _by_time(where, rows, windows, part) if windows.time else np.argsort(part, kind="stable")
    return torch.from_numpy(order), torch.from_numpy(part[order].astype(np.int64))


def told(windows: Windows, validation: float) -> str:
    """What was decided of windows, in a sentence."""
    later = f"{windows.horizon} rows behind its last" if windows.horizon else "of its last row"
    order = f"of {windows.time!r}" if windows.time else "in which they stand"
    by = f" and in each by {windows.series!r}" if windows.series else ""
    owned, spanned = ("a series'", "series") if windows.series else ("a client's", "clients")
    return (
        f"rows count as a series in the order {order}, client by client{by}: a window of {windows.length} rows "
        f"begins every {windows.stride}, its target is that {later}; the last {validation:.0%} of {owned} training "
        f"rows are its validation rows, and no window spans two {spanned} or two splits"
    )
