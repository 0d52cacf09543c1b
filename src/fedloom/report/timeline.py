"""Who computed, sent and waited, in the first rounds of a run: one line a client, from `events.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedloom.report.style import COLOURS, legend, quiet
from fedloom.report.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedloom.runs.shown import Shown

Event = Mapping[str, Any]

CLIENTS = 30  # lines, at most
ROUNDS = 12  # at most
PARTS = {"down": "personal", "work": "global", "up": "train"}  # of a client's time -> colour
NAMES = {"down": "receives", "work": "computes", "up": "sends"}
VAIN = {
    "late": "too late",
    "surplus": "not needed any more",
    "lost": "reply lost",
    "broken": "broken off",
    "silent": "silent",
}


@dataclass(frozen=True)
class Window:
    """What is drawn: events of some clients, and the moments at which server steps ended, up to the last one."""

    clients: list[int]
    events: list[Event]
    ends: list[float]


def window(run: Shown) -> Window | None:
    """The first rounds of which there are events; None if there are none that took time."""
    recorded = list(run.lines("events.jsonl"))
    ends = list(accumulate(float(row.get("virtual_seconds", 0.0)) for row in run.metrics))[:ROUNDS]
    if not recorded or not ends or not ends[-1]:
        return None
    inside = [event for event in recorded if event["round"] <= len(ends) or event["began"] < ends[-1]]
    known = sorted({event["client"] for event in inside})
    step = max(1, -(-len(known) // CLIENTS))
    clients = known[::step]
    return Window(clients, [event for event in inside if event["client"] in set(clients)], ends)


def timeline_figure(shown: Window) -> Figure:
    """A bar for each part of a client's time; what was in vain is crossed out; lines are the server's steps."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8.4, 1.2 + 0.17 * len(shown.clients)), layout="constrained")
    axes = figure.subplots()
    place = {client: row for row, client in enumerate(reversed(shown.clients))}
    for row in place.values():
        axes.axhline(row, color=COLOURS["faint"], linewidth=0.8, zorder=0)
    for part, bars in _bars(shown.events, place).items():
        rows, starts, lengths = zip(*bars, strict=True) if bars else ((), (), ())
        axes.barh(rows, lengths, left=starts, height=0.62, color=COLOURS[PARTS[part]], linewidth=0)
    vain = [event for event in shown.events if event["fate"] in VAIN]
    axes.plot(
        [_end(event) for event in vain], [place[event["client"]] for event in vain], "x", color=COLOURS["worst"], ms=5
    )
    for end in shown.ends:
        axes.axvline(end, color=COLOURS["ink"], linewidth=0.6, alpha=0.5)
    keys: list[Patch | Line2D] = [Patch(color=COLOURS[colour], label=NAMES[part]) for part, colour in PARTS.items()]
    keys.append(Line2D([], [], color=COLOURS["ink"], linewidth=0.6, alpha=0.5, label="server step"))
    if vain:
        keys.append(Line2D([], [], linestyle="", marker="x", color=COLOURS["worst"], label="in vain"))
    quiet(axes)
    axes.grid(visible=False)
    axes.set_yticks(list(place.values()), [str(client) for client in place], fontsize=7)
    axes.set_ylim(-0.7, len(place) - 0.3)
    axes.set_xlim(0, shown.ends[-1])
    axes.set_xlabel("virtual seconds")
    axes.set_ylabel("client", color=COLOURS["soft"], fontsize=9)
    legend(axes, keys, ncols=5)
    return figure


def _bars(events: Sequence[Event], place: Mapping[int, int]) -> dict[str, list[tuple[int, float, float]]]:
    """By part: row, start and length of its bars."""
    bars: dict[str, list[tuple[int, float, float]]] = {part: [] for part in PARTS}
    for event in events:
        start = event["began"]
        for part, drawn in bars.items():
            if event[part]:
                drawn.append((place[event["client"]], start, event[part]))
            start += event[part]
    return bars


def _end(event: Event) -> float:
    return float(event["began"] + sum(event[part] for part in PARTS))


def described(shown: Window) -> str:
    """The picture in words."""
    total = {part: sum(event[part] for event in shown.events) for part in PARTS}
    spent = sum(total.values()) or 1.0
    shares = ", ".join(f"{NAMES[part]} {100 * seconds / spent:.0f} %" for part, seconds in total.items())
    fates = [VAIN[event["fate"]] for event in shown.events if event["fate"] in VAIN]
    said = "; ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates)) or "nothing in vain"
    return (
        f"{counted(len(shown.clients), 'client')} over {shown.ends[-1]:.4g} virtual seconds and "
        f"{counted(len(shown.ends), 'server step')}; of the time in which a client is busy it {shares}; {said}."
    )
