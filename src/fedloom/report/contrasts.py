"""The pictures of a comparison: curves with bands, scores with intervals, clients, and ranks over settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.comparison.measures import TRAFFIC, of_run, running
from fedloom.comparison.statistics import Ranks, interval
from fedloom.quality import ACCURACY, Quality
from fedloom.report.curves import MARKED, SIZE
from fedloom.report.style import COLOURS, SERIES, quiet
from fedloom.report.words import unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedloom.comparison.table import Row
    from fedloom.runs.record import Run

GRID = 60  # places on x at which curves of different seeds are put together
DASHES = ("solid", (0, (4, 2)), (0, (1, 1.5)))
ROW = 0.42  # inches a method


@dataclass(frozen=True)
class Looks:
    """How each method is drawn, in all pictures."""

    place: Mapping[str, int]

    @staticmethod
    def of(methods: Sequence[str]) -> Looks:
        """By their order in the comparison."""
        return Looks({method: i for i, method in enumerate(methods)})

    def variable(self, method: str) -> str:
        """The name of its colour in the page."""
        return list(SERIES)[self.place[method] % len(SERIES)]

    def colour(self, method: str) -> str:
        """On a light page."""
        return SERIES[self.variable(method)][0]

    def dashes(self, method: str) -> str | tuple[float, tuple[float, ...]]:
        """Another once the colours come again."""
        return DASHES[self.place[method] // len(SERIES) % len(DASHES)]


@dataclass(frozen=True)
class Band:
    """A mean over seeds and its interval along x, all [P]; one seed has no interval: `low` and `high` are the mean."""

    method: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


Cost = Callable[[Sequence[Mapping[str, float]]], list[float]]

COSTS: dict[str, Cost] = {
    "round": lambda rows: [float(row["round"]) for row in rows],
    "bytes": lambda rows: running(rows, *TRAFFIC),
    "virtual": lambda rows: running(rows, "virtual_seconds"),
    "wall": lambda rows: running(rows, "seconds"),
}


def shown(metric: str, main: Quality = ACCURACY) -> str:
    """The column of the rounds that curves show: the metric, or the personal one for one that rounds do not have."""
    return f"personal_test_{main.name}" if of_run(metric) else metric


def band(method: str, runs: Sequence[Run], column: str, cost: Cost) -> Band | None:
    """The runs of a method, one a seed, put together over the costs that all of them reached; None without numbers."""
    import numpy as np

    lines = []
    for run in runs:
        rows = run.metrics
        at = [(x, row[column]) for x, row in zip(cost(rows), rows, strict=True) if row.get(column) is not None]
        if at:
            lines.append(([x for x, _ in at], [y for _, y in at]))
    if not lines:
        return None
    start, end = max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines)
    alike = all(xs == lines[0][0] for xs, _ in lines)
    x = lines[0][0] if alike else np.linspace(start, end, GRID).tolist() if end > start else [end]
    spreads = [interval(column) for column in np.array([np.interp(x, xs, ys) for xs, ys in lines]).T.tolist()]
    mean = [s.mean or 0.0 for s in spreads]
    lows = [m if s.low is None else s.low for s, m in zip(spreads, mean, strict=True)]
    highs = [m if s.high is None else s.high for s, m in zip(spreads, mean, strict=True)]
    return Band(method, list(x), mean, lows, highs)


def curves_figure(bands: Sequence[Band], kind: str, looks: Looks, across: str, in_shares: bool = True) -> Figure:
    """A mean curve a method with its 95 % interval over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    divisor, name = unit(max(b.x[-1] for b in bands)) if kind == "bytes" else (1.0, "")
    for b in bands:
        x, colour = [value / divisor for value in b.x], looks.colour(b.method)
        marked = "o" if len(x) <= min(MARKED, 12) else None
        axes.plot(x, b.mean, color=colour, lw=1.8, ls=looks.dashes(b.method), marker=marked, ms=3, label=b.method)
        low, high = ([max(0.0, v) for v in b.low], [min(1.0, v) for v in b.high]) if in_shares else (b.low, b.high)
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    if in_shares:
        shares(axes, "y")
        tops = [min(1.0, v) for b in bands for v in b.high]
        axes.set_ylim(max(0.0, min(min(b.mean) for b in bands) - 0.05), min(1.02, max(tops) + 0.03))
    if kind == "round":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    quiet(axes)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{name} {across}".strip())
    return figure


def scores_figure(
    rows: Sequence[Row], looks: Looks, words: str, reference: str | None, in_shares: bool = True
) -> Figure:
    """A method a line: its mean, the 95 % interval over seeds, and every seed as a small dot."""
    axes, figure = _lines([row.method for row in rows], looks)
    for place, row in enumerate(rows):
        colour, score = looks.colour(row.method), row.score
        if score.mean is None:
            axes.text(0.5, place, "failed" if row.errors else "not done", transform=_beside(axes), ha="center",
                      va="center", color=COLOURS["soft"], fontsize=9)  # fmt: skip
            continue
        axes.scatter(score.values, [place + 0.22] * len(score.values), 9, color=colour, alpha=0.45, linewidth=0)
        if score.low is not None and score.high is not None:
            axes.plot([score.low, score.high], [place, place], color=colour, lw=2.4, solid_capstyle="round")
        axes.scatter(score.mean, place, 46, color=colour, linewidth=0, zorder=3)
        if row.method == reference:
            axes.axvline(score.mean, color=COLOURS["soft"], lw=1, ls=(0, (1, 2)), zorder=0)
    if in_shares:
        shares(axes, "x")
    axes.set_xlabel(f"{words}: mean, 95 % interval over seeds, seeds")
    return figure


def clients_figure(clients: Mapping[str, Sequence[float]], looks: Looks, main: Quality = ACCURACY) -> Figure:
    """A method a line: every client's main measure at every seed as a dot under the shape of their distribution."""
    axes, figure = _lines(list(clients), looks)
    for place, (method, accuracies) in enumerate(clients.items()):
        if not accuracies:
            continue
        colour = looks.colour(method)
        if len(set(accuracies)) > 1:
            drawn: Any = axes.violinplot([list(accuracies)], [place], orientation="horizontal", widths=0.84,
                                    showextrema=False, side="low")  # fmt: skip
            for body in drawn["bodies"]:
                body.set(facecolor=colour, alpha=0.28, linewidth=0)
        heights = [place + 0.1 + 0.26 * _scattered(i) for i in range(len(accuracies))]
        axes.scatter(accuracies, heights, 5, color=colour, alpha=0.5, linewidth=0, rasterized=len(accuracies) > 2000)
        mean = sum(accuracies) / len(accuracies)
        axes.plot([mean, mean], [place - 0.38, place + 0.38], color=COLOURS["ink"], lw=1.2)
    axes.invert_yaxis()
    axes.set_ylim(-0.6, len(clients) - 0.4)
    axes.invert_yaxis()
    if main.unit == "share":
        shares(axes, "x")
    axes.set_xlabel(f"a client's test {main.words}; line: mean over clients")
    return figure


def ranks_figure(ranks: Ranks, looks: Looks) -> Figure:
    """Mean ranks on a line, with a bar over methods that are closer than the critical difference (Demsar 2006)."""
    from matplotlib.figure import Figure

    order = sorted(ranks.means, key=lambda method: ranks.means[method])
    k, half = len(order), (len(order) + 1) // 2
    bars = len(ranks.groups)
    floor = 0.9 + 0.28 * bars
    figure = Figure(figsize=(7.2, 0.9 + 0.28 * (half + bars)), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    width = max(1.0, k - 1)
    axes.set_xlim(1 - 0.5 * width, k + 0.5 * width)
    axes.set_ylim(-(floor + 0.45 * half), 1.2)
    axes.plot([1, k], [0, 0], color=COLOURS["soft"], lw=1.2)
    for tick in range(1, k + 1):
        axes.plot([tick, tick], [0, 0.12], color=COLOURS["soft"], lw=1)
        axes.text(tick, 0.2, str(tick), ha="center", va="bottom", color=COLOURS["soft"], fontsize=9)
    shown_width = min(ranks.critical, width)
    axes.plot([1, 1 + shown_width], [0.85, 0.85], color=COLOURS["ink"], lw=1.6)
    wide = ", wider than the axis" if ranks.critical > width else ""
    axes.text(1, 0.93, f"critical difference {ranks.critical:.2f}{wide}", fontsize=9, color=COLOURS["ink"])
    for place, method in enumerate(order):
        left = place < half
        depth = -(floor + 0.45 * (place if left else k - 1 - place))
        edge = 1 - 0.06 * width if left else k + 0.06 * width
        rank, colour = ranks.means[method], looks.colour(method)
        axes.plot([rank, rank, edge], [0, depth, depth], color=colour, lw=1.3)
        axes.scatter(rank, 0, 26, color=colour, linewidth=0, zorder=3)
        text = f"{method}  {rank:.2f}" if left else f"{rank:.2f}  {method}"
        axes.text(edge + (-0.02 if left else 0.02) * width, depth, text, ha="right" if left else "left", va="center",
                  color=COLOURS["ink"], fontsize=9.5, parse_math=False)  # fmt: skip
    for level, group in enumerate(ranks.groups):
        ends = [ranks.means[group[0]] - 0.02 * width, ranks.means[group[-1]] + 0.02 * width]
        height = -(0.35 + 0.28 * level)
        axes.plot(ends, [height, height], color=COLOURS["ink"], lw=3.2, solid_capstyle="round")
    return figure


def shares(axes: Axes, which: str) -> None:
    """An axis in percent."""
    from matplotlib.ticker import PercentFormatter

    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _lines(methods: Sequence[str], looks: Looks) -> tuple[Axes, Figure]:
    """Axes with a line a method, the first above, its name in its colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0] * 1.25, 0.8 + ROW * len(methods)), layout="constrained")
    axes = figure.subplots()
    quiet(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=COLOURS["faint"], linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods, parse_math=False)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    for label, method in zip(axes.get_yticklabels(), methods, strict=True):
        label.set(color=looks.colour(method), fontsize=9.5)
    return axes, figure


def _beside(axes: Axes) -> object:
    """x in shares of the axes, y in data."""
    return axes.get_yaxis_transform()


def _scattered(i: int) -> float:
    """The ith number of van der Corput's sequence: even in [0, 1) without chance."""
    value, part = 0.0, 0.5
    while i:
        value, i, part = value + part * (i & 1), i >> 1, part / 2
    return value
