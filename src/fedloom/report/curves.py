"""Accuracy and loss against rounds, and accuracy against the bytes that it took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedloom.quality import Quality, judged_by, main_of
from fedloom.report.style import COLOURS, legend, quiet
from fedloom.report.words import brief, hours, named, single, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedloom.runs.shown import Shown

Row = Mapping[str, Any]

Series = tuple[str, str, str, str | None]  # label, colour, column, and that of its spread


def qualities(main: Quality) -> tuple[Series, ...]:
    """The series of a problem's main measure."""
    return (
        ("global model", "global", f"global_test_{main.name}", None),
        ("personal mean ± std", "personal", f"personal_test_{main.name}", f"personal_test_{main.name}_std"),
        ("worst client", "worst", f"worst_client_{main.name}", None),
        ("newcomers", "train", f"newcomer_test_{main.name}", None),
    )


LOSSES = (("training", "train", "train_loss", None), ("test, global model", "global", "global_test_loss", None))
TURNS = ("global", "personal", "worst", "train", "ink", "soft")  # colours of judged models and tests by themselves
TRAFFIC = ("up_bytes", "down_bytes", "peer_bytes")
CIRCUMSTANCES = (  # title, columns that begin so, whether they are shares
    ("Attack", ("attack/precision", "attack/recall", "attack_success_rate"), True),
    ("Privacy: epsilon so far", ("dp/epsilon",), False),
)
SIZE = (4.2, 3.0)  # inches; narrow, so that text stays legible on a telephone
MARKED = 40  # points, at most, that are drawn as dots too
STEEP = 50  # largest loss over smallest, from which on the axis is logarithmic


@dataclass(frozen=True)
class Curve:
    """One series: `x` [P], `y` [P] and the half-width of its band, `spread` [P] (zero: no band); all finite."""

    label: str
    colour: str
    x: list[float]
    y: list[float]
    spread: list[float]


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes; `chosen` is the place on x of the round that the validation data chose."""

    title: str
    across: str
    curves: list[Curve]
    shares: bool  # y is a share, shown in percent
    chosen: float | None


def panels(run: Shown) -> list[Panel]:
    """The panels for which the run has numbers: accuracy, loss, accuracy against bytes and against virtual time."""
    rows = run.metrics
    rounds = [float(row["round"]) for row in rows]
    carried = list(accumulate(sum(float(row.get(name, 0)) for name in TRAFFIC) for row in rows))
    divisor, name = unit(carried[-1] if carried else 0)
    spent = [count / divisor for count in carried]
    round, bytes_then = None, None
    main = main_of(rows)
    called, share = main.words[:1].upper() + main.words[1:], main.unit == "share"
    whole = qualities(main)
    means = (whole[0], ("personal mean", "personal", f"personal_test_{main.name}", None))
    if any(row.get(f"validation_{main.name}") is not None for row in rows):
        round = float(run.selected["round"])
        bytes_then = spent[rounds.index(round)]
    across = f"{name} of training messages so far"
    drawn = [
        Panel(called, "round", _curves(rows, rounds, whole), share, round),
        Panel("Loss", "round", _curves(rows, rounds, LOSSES), False, round),
    ]
    for plain, said in ((f"global_test_{main.name}", "Global model"), (f"personal_test_{main.name}", "Personal")):
        each = single(plain, rows)
        series = [(named(n, "").strip(), TURNS[i % len(TURNS)], n, None) for i, n in enumerate(each)]
        drawn.append(Panel(f"{said}: one by one", "round", _curves(rows, rounds, series), share, round))
    if any(carried) and (len(carried) == 1 or carried[-1] > carried[0]):
        drawn.append(Panel(f"{called} for bytes", across, _curves(rows, spent, means), share, bytes_then))
    if len({row.get("virtual_seconds", 0.0) for row in rows}) > 1:  # else time is a multiple of rounds
        passed = list(accumulate(float(row.get("virtual_seconds", 0.0)) for row in rows))
        divisor, name = hours(passed[-1])
        times = [seconds / divisor for seconds in passed]
        then = None if round is None else times[rounds.index(round)]
        drawn.append(Panel(f"{called} for time", f"virtual {name} so far", _curves(rows, times, means), share, then))
    for title, begins, share in CIRCUMSTANCES:
        names = list(dict.fromkeys(name for row in rows for name in row if name.startswith(begins)))
        curves = [(_said(name), TURNS[i % len(TURNS)], name, None) for i, name in enumerate(names)]
        drawn.append(Panel(title, "round", _curves(rows, rounds, curves), share, None))
    for one in dict.fromkeys(judged_by(rows)):
        if one != main and one.name != "loss":
            three = (*qualities(one)[:2], ("validation", "train", f"validation_{one.name}", None))
            name = one.words[:1].upper() + one.words[1:]
            drawn.append(Panel(name, "round", _curves(rows, rounds, three), one.unit == "share", round))
    return [panel for panel in drawn if panel.curves]


def _said(column: str) -> str:
    """A column of a stage's numbers in words: `attack success rate`."""
    return column.removeprefix("global_test_").rpartition("/")[2].replace("_", " ")


def draw(panel: Panel, axes: Axes) -> None:
    """Draws a panel; a curve that lies on another stays visible beneath its dashes."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for place, curve in enumerate(panel.curves):
        colour = COLOURS[curve.colour]
        dots = "o" if len(curve.x) <= MARKED else None
        dashes = (0, (4, 2)) if curve.colour == "personal" and place else "solid"
        axes.plot(curve.x, curve.y, color=colour, linestyle=dashes, marker=dots, ms=3.2, lw=1.8, label=curve.label)
        if any(curve.spread):
            pairs = list(zip(curve.y, curve.spread, strict=True))
            most = 1.0 if panel.shares else math.inf
            low, high = [max(0.0, y - s) for y, s in pairs], [min(most, y + s) for y, s in pairs]
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.13, linewidth=0)
    heights = [y for curve in panel.curves for y in curve.y]
    if panel.shares:
        top = max([*heights, *(min(1, y + s) for c in panel.curves for y, s in zip(c.y, c.spread, strict=True))])
        axes.set_ylim(0, max(0.05, 1.04 * top))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    elif min(heights) > 0 and max(heights) > STEEP * min(heights):
        axes.set_yscale("log")
    if panel.across == "round":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if panel.chosen is not None:
        axes.axvline(panel.chosen, color=COLOURS["soft"], lw=1, ls=(0, (1, 2)), label="chosen by validation")
    quiet(axes)
    axes.set_xlabel(panel.across)
    axes.set_xlim(left=0)
    legend(axes)


def axis_label(title: str) -> str:
    """What the y-axis of a panel is called: `accuracy` of "Accuracy for bytes", and RMSE as it stands."""
    first = title.partition(" for ")[0].partition(" ")[0]
    return first if first.isupper() else first.lower()


def panel_figure(panel: Panel) -> Figure:
    """One panel on its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    draw(panel, figure.subplots())
    return figure


def figure(run: Shown) -> Figure:
    """All panels side by side, on white."""
    from matplotlib.figure import Figure

    drawn = panels(run)
    spec = run.spec
    whole = Figure(figsize=(5.2 * max(1, len(drawn)), 4.1), layout="constrained", facecolor="white")
    title = f"{brief(spec.method['name'])} on {brief(spec.data)}, {spec.partition}"
    whole.suptitle(title, x=0.01, ha="left", fontsize=11, color=COLOURS["ink"], parse_math=False)
    if not drawn:
        whole.text(0.5, 0.5, "nothing to draw yet", ha="center", color=COLOURS["soft"])
        return whole
    for panel, axes in zip(drawn, whole.subplots(1, len(drawn), squeeze=False)[0], strict=True):
        draw(panel, axes)
        axes.set_ylabel(axis_label(panel.title))
    return whole


def _curves(rows: Sequence[Row], x: Sequence[float], series: Iterable[Series]) -> list[Curve]:
    """The series that have a finite number anywhere, with the rows that lack one left out."""
    found = []
    for label, colour, name, spread in series:
        points = list(_points(rows, x, name, spread))
        if points:
            columns = [list(column) for column in zip(*points, strict=True)]
            found.append(Curve(label, colour, *columns))
    return found


def _points(
    rows: Sequence[Row], x: Sequence[float], name: str, spread: str | None
) -> Iterator[tuple[float, float, float]]:
    for place, row in zip(x, rows, strict=True):
        y, s = row.get(name), row.get(spread or "") or 0.0
        if y is not None and math.isfinite(y):
            yield place, y, s
