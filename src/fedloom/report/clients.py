"""How well each client is served: a picture of the last evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedloom.quality import ACCURACY, Quality
from fedloom.report.curves import SIZE
from fedloom.report.style import COLOURS, legend, quiet
from fedloom.report.words import counted, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def of_all(clients: Sequence[Mapping[str, Any]], main: Quality) -> float:
    """The clients' measure over all their test rows, as `personal_test_accuracy` is."""
    return main.pool([(client["n"], client[main.name]) for client in clients])


def ranked(clients: Sequence[Mapping[str, Any]], main: Quality) -> list[Mapping[str, Any]]:
    """The clients from the worst to the best."""
    return sorted(clients, key=lambda client: (main.score(client[main.name]), client["id"]))


def _worst(client: Mapping[str, Any], main: Quality) -> str:
    rows = counted(client["n"], "row")
    return f"worst: client {client['id']}, {told(client[main.name], main.unit)} of {rows}"


def clients_figure(clients: Sequence[Mapping[str, Any]], main: Quality = ACCURACY) -> Figure:
    """A stem a client (`id`, its measure, `n`), from the worst to the best; its dot has the area of its test rows.

    The mean and the worst client are marked.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    clients = ranked(clients, main)
    count = len(clients)
    heights = np.array([client[main.name] for client in clients])
    tests = np.array([client["n"] for client in clients], dtype=float)
    room = 72 * 0.85 * SIZE[0] / count  # points between two stems
    places = np.arange(count)

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    colour, worst = COLOURS["personal"], COLOURS["worst"]
    axes.vlines(places, 0, heights, color=[worst, *[colour] * (count - 1)], alpha=0.25, linewidth=min(6.0, 0.7 * room))
    largest = np.clip(0.55 * room, 3.5, 12) ** 2  # square points
    areas = np.maximum(3, largest * tests / tests.max())
    mean, low = of_all(clients, main), _worst(clients[0], main)
    axes.scatter(places[1:], heights[1:], areas[1:], color=colour, linewidth=0, clip_on=False)
    axes.scatter(0, heights[0], max(24, areas[0]), color=worst, linewidth=0, zorder=3, label=low, clip_on=False)
    axes.axhline(mean, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)), label=f"mean {told(mean, main.unit)}")
    axes.set_xlim(-0.8, max(count - 0.2, 4.8))
    if main.unit == "share":
        axes.set_ylim(0, 1.06)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    else:
        axes.set_ylim(bottom=min(0.0, float(heights.min())))
        axes.set_ylabel(f"test {main.words}")
    axes.set_xticks([])
    axes.set_xlabel("clients, from the worst to the best")
    quiet(axes)
    legend(axes)
    return figure
