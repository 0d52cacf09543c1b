"""A test split held out of the training rows, where a data set comes without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data.arrow import raw_values
from fedloom.data.source import listed
from fedloom.errors import UsageError
from fedloom.random import numpy_stream

if TYPE_CHECKING:
    import pyarrow as pa


HELD_OUT = 0.2  # the share of rows, where nothing else is asked for


def refuse_share(data: str, share: float | None, rows: int) -> None:
    """Raises UsageError where a share of test rows is asked for, and data bring theirs."""
    if share is not None:
        raise UsageError(
            f"test_share={share:g}: {data} has a test split of its own, of {rows:,} rows, and none is held out; leave "
            "it out, or give the training split alone"
        )


def untested(sizes: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    """What is to be told where some clients have no test rows, in a sentence; nothing where all have some."""
    without = [name for size, name in zip(sizes, names, strict=True) if not size]
    told = f"{len(without)} of {len(sizes)} clients have no test rows, and no say in personal measures: "
    return (told + listed(without),) if without else ()


def percent(share: float) -> str:
    """A share in words: 20%, 12.5%."""
    return f"{share * 100:.3g}%"


def hold_out(
    data: str,
    table: pa.Table,
    label: str,
    client: str | None,
    seed: int,
    share: float,
    strata: np.ndarray | None = None,
) -> tuple[pa.Table, pa.Table]:
    """A seeded, stratified split: `share` of the rows of each class, at least one and not all, is the test split.

    `strata`, int64 [N], stand for classes where the label is none.

    A client that would be left without training rows gets one back, and a row of the same class of a client with rows
    to spare is held out for it. A client with two rows or more of which none would be held out gets a test row
    likewise, as far as other clients have some to spare.
    """
    import pyarrow as pa

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
    held = rank < np.round(share * counts).clip(1, counts - 1)[codes]
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
