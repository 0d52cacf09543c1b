"""How well each client is served: a picture of the last evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedloom.report.curves import SIZE
from fedloom.report.style import COLOURS, legend, quiet
from fedloom.report.words import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mean_accuracy(clients: Sequence[Mapping[str, Any]]) -> float:
    """The clients' accuracy, weighted by their test rows, as `personal_test_accuracy` is."""
    return float(sum(c["accuracy"] * c["n"] for c in clients) / sum(c["n"] for c in clients))


def clients_figure(clients: Sequence[Mapping[str, Any]]) -> Figure:
    """A stem a client (`id`, `accuracy`, `n`), from the worst to the best; the area of its dot goes with its test rows.

    The mean and the worst client are marked.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    ranked = sorted(clients, key=lambda client: (client["accuracy"], client["id"]))
    count = len(ranked)
    heights = np.array([client["accuracy"] for client in ranked])
    tests = np.array([client["n"] for client in ranked], dtype=float)
    room = 72 * 0.85 * SIZE[0] / count  # points between two stems
    places = np.arange(count)

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    colour, worst = COLOURS["personal"], COLOURS["worst"]
    axes.vlines(places, 0, heights, color=[worst, *[colour] * (count - 1)], alpha=0.25, linewidth=min(6.0, 0.7 * room))
    largest = np.clip(0.55 * room, 3.5, 12) ** 2  # square points
    areas = np.maximum(3, largest * tests / tests.max())
    mean, low = mean_accuracy(ranked), f"worst: client {ranked[0]['id']}, {percent(heights[0])}"
    axes.scatter(places[1:], heights[1:], areas[1:], color=colour, linewidth=0, clip_on=False)
    axes.scatter(0, heights[0], max(24, areas[0]), color=worst, linewidth=0, zorder=3, label=low, clip_on=False)
    axes.axhline(mean, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)), label=f"mean {percent(mean)}")
    axes.set_xlim(-0.8, max(count - 0.2, 4.8))
    axes.set_ylim(0, 1.06)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.set_xticks([])
    axes.set_xlabel("clients, from the worst to the best")
    quiet(axes)
    legend(axes)
    return figure
