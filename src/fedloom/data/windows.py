"""Series cut into windows: of each client's rows, in their order, so that no window spans two clients or two splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedloom.data.arrow import raw_values
from fedloom.data.files import Windows
from fedloom.data.shards import Shards
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


def hold_last_out(data: str, table: pa.Table, client: str | None, share: float) -> tuple[pa.Table, pa.Table]:
    """The first rows of each client, and the last `share` of them as its test rows."""
    import pyarrow as pa

    if client is None:
        raise UsageError(
            f"windows are cut of each client's rows in their order, and the partition deals the rows of {data} singly; "
            "set partition=column:NAME, of a column that names the clients"
        )
    owner = torch.from_numpy(np.unique(raw_values(table.column(client)), return_inverse=True)[1].astype(np.int64))
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
    dealt: Mapping[str, Shards], names: Sequence[str], windows: Windows
) -> tuple[Tensor, dict[str, Shards], tuple[str, ...]]:
    """The rows of each window and of what comes after it up to its target [M, length + horizon], and whose they are.

    `dealt` are the splits, `names` the clients'. Windows are numbered split by split, client by client. Beside them is
    what is to be told. Raises UsageError where a client's training rows, or all test rows, are too few for a window.
    """
    shards: dict[str, Shards] = {}
    found: list[Tensor] = []
    reach, made = windows.length + windows.horizon, 0
    for split, rows_of in dealt.items():
        sizes = []
        for client in range(len(rows_of)):
            rows = rows_of[client]
            first = starts(len(rows), windows)
            if not len(first) and split == "train":
                raise UsageError(
                    f"client {names[client]} has {len(rows)} training rows, too few for a window, which with its "
                    f"target has {reach}; take shorter ones, or leave that client's rows out"
                )
            found.append(rows[first[:, None] + torch.arange(reach)])
            sizes.append(len(first))
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        shards[split] = Shards(made + torch.arange(int(offsets[-1])), offsets)
        made += int(offsets[-1])
    if not len(shards["test"].rows):
        raise UsageError(
            f"no client has enough test rows for a window, which with its target has {reach}; take shorter ones, or "
            "give test rows in a file of their own"
        )
    nothing = "no client has enough validation rows for a window: rounds are chosen by nothing"
    return torch.cat(found), shards, () if len(shards["validation"].rows) else (nothing,)


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


def told(windows: Windows, validation: float) -> str:
    """What was decided of windows, in a sentence."""
    later = f"{windows.horizon} rows behind its last" if windows.horizon else "of its last row"
    return (
        f"rows count as a series in the order in which they stand, client by client: a window of {windows.length} rows "
        f"begins every {windows.stride}, its target is that {later}; the last {validation:.0%} of a client's training "
        "rows are its validation rows, and no window spans two clients or two splits"
    )
