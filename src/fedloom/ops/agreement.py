"""How well two ways to group the same things agree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def adjusted_rand(found: Sequence[Hashable], known: Sequence[Hashable]) -> float:
    """The adjusted Rand index of two groupings of N things: 1 if they agree, about 0 if by chance, less if by less.

    Hubert, Arabie: Comparing Partitions, Journal of Classification 2, 1985. Groups are told apart by their labels,
    which may differ between the two. Raises ValueError unless both have N labels.

    Examples:
        >>> from fedloom.ops.agreement import adjusted_rand
        >>> adjusted_rand([0, 0, 1, 1], ["b", "b", "a", "a"]), adjusted_rand([0, 1, 0, 1], ["b", "b", "a", "a"])
        (1.0, -0.5)
    """
    if len(found) != len(known):
        raise ValueError(f"{len(found)} labels and {len(known)} are of different things; give one of each a thing")
    rows, columns = ([*dict.fromkeys(labels)] for labels in (found, known))
    table = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for one, other in zip(found, known, strict=True):
        table[rows.index(one), columns.index(other)] += 1

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) // 2).sum())

    both, mine, theirs, all_pairs = (
        pairs(counts) for counts in (table, table.sum(1), table.sum(0), np.array([len(found)]))
    )
    expected = mine * theirs / all_pairs if all_pairs else 0.0
    most = (mine + theirs) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)
