"""Pictures of tables of numbers: tasks over a stream, clients over rounds, a sweep over two fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedloom.quality import Quality
from fedloom.report.curves import SIZE
from fedloom.report.style import COLOURS, quiet
from fedloom.report.words import told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WRITTEN = 120  # cells, at most, in which their numbers stand
TICKS = 12  # labels of an axis, at most
DARK = "#1d2127"  # of numbers on pale cells, which stay pale on a dark page: no colour of a theme
CLIENTS = 100  # lines, at most, of a map of clients

Cells = Sequence[Sequence[float | None]]


def map_figure(
    cells: Cells, unit: str, better: str, down: tuple[str, Sequence[Any]], across: tuple[str, Sequence[Any]]
) -> Figure:
    """Cells, a list of rows, as colours, darker where better, with their numbers where there is room.

    `down` and `across` are the name of an axis and its labels. A cell of None is left empty.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    values = np.array([[math.nan if one is None else one for one in row] for row in cells], dtype=float)
    rows, columns = values.shape
    figure = Figure(figsize=(SIZE[0] * 1.25, min(7.0, 1.0 + 0.34 * max(rows, 3))), layout="constrained")
    axes = figure.subplots()
    shade = -values if better == "low" else values
    colours = LinearSegmentedColormap.from_list("", ["#e8f1f8", COLOURS["global"]])
    axes.imshow(np.ma.masked_invalid(shade), cmap=colours, aspect="auto", interpolation="nearest")
    if rows * columns <= WRITTEN:
        known = shade[np.isfinite(shade)]
        middle = (known.min() + known.max()) / 2 if len(known) else 0.0
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                ink = "white" if shade[row, column] > middle else DARK
                text = told(value, unit).removesuffix(" %")
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    quiet(axes)
    axes.grid(visible=False)
    for set_ticks, labels in ((axes.set_yticks, down[1]), (axes.set_xticks, across[1])):
        step = max(1, math.ceil(len(labels) / TICKS))
        set_ticks(range(0, len(labels), step), [str(one) for one in labels[::step]], parse_math=False)
    axes.set_ylabel(down[0], color=COLOURS["soft"], fontsize=9)
    axes.set_xlabel(across[0])
    return figure


def by_round(
    lines: Sequence[Mapping[str, Any]], main: Quality
) -> tuple[list[int], list[int], list[list[float | None]]]:
    """Of the tests of clients round by round: clients, rounds, and for each client its main measure by rounds.

    Of many clients and rounds some stand for all, evenly spread.
    """
    having = [line for line in lines if line.get(main.name)]
    having = having[:: max(1, math.ceil(len(having) / CLIENTS))]
    ids = sorted({client for line in having for client in line["id"]})
    ids = ids[:: max(1, math.ceil(len(ids) / CLIENTS))]
    each = [dict(zip(line["id"], line[main.name], strict=True)) for line in having]
    return ids, [line["round"] for line in having], [[found.get(client) for found in each] for client in ids]


def two_fields(fields: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    """The two fields, and no more, by which labelled methods differ; None if there are not two."""
    names = list(dict.fromkeys(name for one in fields.values() for name in one))
    moving = [name for name in names if len({repr(one.get(name)) for one in fields.values()}) > 1]
    return (moving[0], moving[1]) if len(moving) == 2 else None
