"""Who took part how often, how stale replies were, and who was turned away: from `replies.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from fedloom.report.curves import SIZE, Curve, Panel
from fedloom.report.picture import Picture
from fedloom.report.style import COLOURS, legend, quiet
from fedloom.report.words import counted
from fedloom.runs.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS = 100  # clients, at most, that have a bar each
NAMED = 10  # clients, at most, that the words of a picture name


@dataclass
class Participant:
    """In how many rounds a client's reply came, was judged and turned away, and in how many of these it attacked."""

    client: int
    replied: int = 0
    judged: int = 0
    flagged: int = 0
    attacked: int = 0  # of the judged ones
    caught: int = 0  # flagged where it attacked

    @property
    def wronged(self) -> int:
        """Rounds in which it was turned away and had not attacked."""
        return self.flagged - self.caught


def participants(run: Shown) -> list[Participant]:
    """Every client that could take part, by number; none where the record does not say."""
    found: dict[int, Participant] = {}
    for line in run.lines("replies.jsonl"):
        judged, flagged, attacking = (set(line.get(name, ())) for name in ("judged", "flagged", "attacking"))
        for client in set(line["replied"]) | judged:
            one = found.setdefault(client, Participant(client))
            one.replied += client in set(line["replied"])
            one.judged += client in judged
            one.flagged += client in flagged
            one.attacked += client in attacking
            one.caught += client in flagged & attacking
    if not found:
        return []
    population = int(run.partition.get("population") or 0)
    return [found.get(client, Participant(client)) for client in range(max(population, max(found) + 1))]


def participation(everybody: Sequence[Participant], rounds: int) -> dict[str, Picture]:
    """How often each client took part; nothing where all did alike."""
    times = [one.replied for one in everybody]
    if len(set(times)) < 2:
        return {}
    never = times.count(0)
    alt = (
        f"Of {counted(rounds, 'round')} a client took part in {min(times)} to {max(times)}, median {median(times):g}"
        + (f"; {counted(never, 'client')} in none." if never else ".")
    )
    return {"participation": Picture("Who took part", alt, partial(participation_figure, everybody))}


def participation_figure(everybody: Sequence[Participant]) -> Figure:
    """A bar a client, its height the rounds that it took part in; of many clients how many took part how often."""
    axes, figure = _axes()
    times = [one.replied for one in everybody]
    if len(times) <= BARS:
        axes.bar([one.client for one in everybody], times, 0.8, color=COLOURS["global"], linewidth=0)
        axes.axhline(sum(times) / len(times), color=COLOURS["ink"], lw=1, ls=(0, (4, 3)), label="mean")
        axes.set_xlabel("client")
        axes.set_ylabel("rounds", color=COLOURS["soft"], fontsize=9)
        legend(axes)
    else:
        bins = range(max(times) + 2)
        axes.hist(times, [edge - 0.5 for edge in bins], color=COLOURS["global"], linewidth=0)
        axes.set_xlabel("rounds that a client took part in")
        axes.set_ylabel("clients", color=COLOURS["soft"], fontsize=9)
    return figure


def staleness(run: Shown) -> list[Panel]:
    """How stale the replies of submitted work were, round by round; nothing of a run without."""
    lines = [line for line in run.lines("replies.jsonl") if line.get("staleness")]
    if not lines:
        return []
    rounds = [float(line["round"]) for line in lines]
    means = [sum(line["staleness"]) / len(line["staleness"]) for line in lines]
    oldest = [float(max(line["staleness"])) for line in lines]
    none = [0.0] * len(lines)
    curves = [Curve("mean", "global", rounds, means, none), Curve("oldest", "worst", rounds, oldest, none)]
    return [Panel("Staleness of replies", "round", curves, False, None)]


def turned_away(everybody: Sequence[Participant]) -> list[Participant]:
    """Who was flagged, and who attacked, the most often flagged first."""
    there = [one for one in everybody if one.flagged or one.attacked]
    return sorted(there, key=lambda one: (-one.flagged, -one.attacked, one.client))


def flagged(everybody: Sequence[Participant]) -> dict[str, Picture]:
    """How often each client was turned away, and whether it attacked; nothing where nobody was."""
    there = turned_away(everybody)
    if not any(one.flagged for one in there):
        return {}
    alt = ", ".join(f"client {one.client} {one.flagged} of {one.judged} times" for one in there[:NAMED] if one.flagged)
    more = f", and {len(there) - NAMED} more" if len(there) > NAMED else ""
    return {"flagged": Picture("Who was flagged", f"{verdict(everybody)} {alt}{more}.", partial(flagged_figure, there))}


def verdict(everybody: Sequence[Participant]) -> str:
    """How right it was to turn away whom, in a sentence; of all replies that were judged."""
    judged, total = sum(one.judged for one in everybody), sum(one.flagged for one in everybody)
    attacks, caught = sum(one.attacked for one in everybody), sum(one.caught for one in everybody)
    said = f"Of {judged:,} replies that were judged {total:,} were turned away"
    if not attacks:
        return f"{said}; nobody attacked."
    return f"{said}; {attacks:,} were attacks, and {caught:,} of these were among them."


def flagged_figure(there: Sequence[Participant]) -> Figure:
    """A bar a client: how often it was judged, and how often of these flagged, rightly or not."""
    axes, figure = _axes()
    shown, places = there[:BARS], range(len(there[:BARS]))
    axes.bar(places, [one.judged for one in shown], 0.8, color=COLOURS["faint"], linewidth=0, label="judged")
    caught = [one.caught for one in shown]
    axes.bar(places, caught, 0.8, color=COLOURS["train"], linewidth=0, label="flagged, attacked")
    wronged = [one.wronged for one in shown]
    axes.bar(places, wronged, 0.8, bottom=caught, color=COLOURS["personal"], linewidth=0, label="flagged, honest")
    missed = [(place, one.flagged) for place, one in zip(places, shown, strict=True) if one.attacked > one.caught]
    if missed:
        where, height = zip(*missed, strict=True)
        axes.plot(where, [h + 0.02 * max(one.judged for one in shown) for h in height], "x", ms=4,
                  color=COLOURS["worst"], label="attacked unnoticed")  # fmt: skip
    step = max(1, -(-len(shown) // 20))
    axes.set_xticks(places[::step], [str(one.client) for one in shown[::step]])
    axes.set_xlabel("client, the most often flagged first")
    axes.set_ylabel("rounds", color=COLOURS["soft"], fontsize=9)
    legend(axes)
    return figure


def _axes() -> tuple[Axes, Figure]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    quiet(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return axes, figure
