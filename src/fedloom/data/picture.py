"""A picture of what every client got."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.letters import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLITS = {"train": "#0072b2", "validation": "#56b4e9", "test": "#bbbbbb"}  # Okabe and Ito's blues, and grey
NUMBERED = 300  # cells, at most, to write the numbers into
WIDE = 25  # clients, at most, beside whose numbers there is room


def partition_figure(table: dict[str, Any]) -> "Figure":
    """The figure of a `Federation.table()`: each client's rows above, its training rows of each class below.

    Needs no display; save it with `figure.savefig`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients, classes = table["clients"], table["classes"]
    count, population = len(clients), table["population"]
    labels = np.array([client["labels"] for client in clients]).T

    height = min(5.5, max(1.5, 0.3 * len(classes)))
    figure = Figure(figsize=(9, 2.6 + height), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, height])

    bottom = np.zeros(count)
    for split, colour in SPLITS.items():
        top = bottom + [client[split] for client in clients]
        if count <= 100:
            above.bar(range(count), top - bottom, 0.8, bottom, color=colour, linewidth=0, label=split)
        else:
            above.stairs(top, np.arange(count + 1) - 0.5, baseline=bottom, fill=True, color=colour, label=split)
        bottom = top
    shown = f"{population:,} clients" if count == population else f"the first {count:,} of {population:,} clients"
    above.set_title(f"{printable(table['partition'])}, {shown}", loc="left", fontsize=11, parse_math=False)
    above.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, handlelength=1)
    above.set_ylabel("rows")
    above.spines[["top", "right"]].set_visible(False)
    above.tick_params(axis="x", length=0)
    above.yaxis.set_major_locator(MaxNLocator(4, integer=True))

    # The square root of the scale: clients with few rows stay visible beside those with many; white is none at all.
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, labels.max()))
    cells = np.ma.masked_equal(labels, 0)
    image = below.imshow(cells, aspect="auto", cmap="Blues", norm=norm, interpolation="nearest")
    if labels.size <= NUMBERED and labels.shape[1] <= WIDE:
        for (c, k), n in np.ndenumerate(labels):
            ink = "white" if norm(n) > 0.6 else "black"
            below.text(k, c, str(n) if n else "", ha="center", va="center", fontsize=8, color=ink)
    else:
        bar = figure.colorbar(image, ax=below, label="training rows", pad=0.01, aspect=30, ticks=MaxNLocator(5))
        bar.outline.set_visible(False)
    step = -(-len(classes) // 30)
    names = [name if len(name) <= 16 else f"{name[:15]}\u2026" for name in map(_visible, classes)]
    below.set_yticks(range(0, len(classes), step), names[::step], fontsize=8, parse_math=False)
    below.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    below.set_xlim(-0.5, count - 0.5)
    below.set_xlabel("client")
    below.set_ylabel("class")
    below.spines[:].set_visible(False)
    return figure


def _visible(name: str) -> str:
    return printable(name) if name.strip() else repr(name)
