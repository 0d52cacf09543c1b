"""A test split held out of the training rows, where a data set comes without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedloom.data.arrow import raw_values
from fedloom.data.source import listed
from fedloom.errors import UsageError
from fedloom.random import numpy_stream

if TYPE_CHECKING:
    import pyarrow as pa


def hold_out(
    data: str,
    table: pa.Table,
    label: str,
    client: str | None,
    seed: int,
    share: float,
    strata: np.ndarray | None = None,
) -> tuple[pa.Table, pa.Table]:
    """A seeded, stratified split: `share` of the rows of each class, at least one, is the test split.

    `strata`, int64 [N], stand for classes where the label is none.

    A client that would be left without training rows gets one back, and a row of the same class of a client with rows
    to spare is held out for it. A client with two rows or more of which none would be held out gets a test row
    likewise, as far as other clients have some to spare.
    """
    import pyarrow as pa

    if not 0 < share < 1:
        raise UsageError(f"got a test share of {share}; expected a number between 0 and 1, such as 0.2")
    classes = raw_values(table.column(label)).astype(str) if strata is None else strata
    values, codes = np.unique(classes, return_inverse=True)
    counts = np.bincount(codes, minlength=len(values))
    if (counts == 1).any():
        raise UsageError(
            f"class {listed(values[counts == 1])} of {data} has one row, which cannot be in both splits; "
            f"drop it, add rows, or check that {label!r} is the label"
        )
    shuffled = numpy_stream(seed, "data", "test").permutation(len(codes))
    grouped = shuffled[np.argsort(codes[shuffled], kind="stable")]
    rank = np.empty(len(codes), dtype=np.int64)
    rank[grouped] = np.arange(len(codes)) - np.repeat(counts.cumsum() - counts, counts)
    held = rank < np.maximum(1, np.round(share * counts))[codes]
    if client is not None:
        owner = np.unique(raw_values(table.column(client)), return_inverse=True)[1]
        _spare(data, held, grouped, codes, owner)
        _test_all(held, grouped, codes, owner)
    return table.filter(pa.array(~held)), table.filter(pa.array(held))


def _spare(data: str, held: np.ndarray, grouped: np.ndarray, codes: np.ndarray, owner: np.ndarray) -> None:
    """Gives, in place, every client a training row; `grouped` are the rows in the order in which they are held out."""
    left = np.bincount(owner[~held], minlength=owner.max() + 1)
    for client in np.flatnonzero(left == 0):
        for row in sorted(np.flatnonzero(owner == client), key=lambda row: -int(np.sum(codes == codes[row]))):
            others = grouped[codes[grouped] == codes[row]]
            free = others[~held[others] & (left[owner[others]] > 1)]
            if len(free):
                held[row], held[free[0]] = False, True
                left[client] += 1
                left[owner[free[0]]] -= 1
                break
        else:
            held[row] = False  # of the last class tried, one test row less
            left[client] += 1
    empty = np.setdiff1d(codes, codes[held])
    if len(empty):
        raise UsageError(
            f"{data} has too few rows to hold a test split out and leave every client one to train on; give the test "
            "rows in a file of their own"
        )


def _test_all(held: np.ndarray, grouped: np.ndarray, codes: np.ndarray, owner: np.ndarray) -> None:
    """Holds out, in place, a row of every client that has two, as far as others of its class have one to give back.

    So the classes keep their shares, and nobody loses its last test row.
    """
    kept, tested = (np.bincount(owner[those], minlength=owner.max() + 1) for those in (~held, held))
    for client in np.flatnonzero((tested == 0) & (kept > 1)):
        for row in grouped[owner[grouped] == client]:
            alike = grouped[codes[grouped] == codes[row]]
            spare = alike[held[alike] & (tested[owner[alike]] > 1)]
            if len(spare):
                held[row], held[spare[-1]] = True, False
                tested[client] += 1
                tested[owner[spare[-1]]] -= 1
                break
