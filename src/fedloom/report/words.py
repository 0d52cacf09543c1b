"""How the report and the command line say things: bytes, seconds, shares, and what a run gives away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom import quality
from fedloom.calls import SILENT
from fedloom.quality import KNOWN, in_column

UNITS = ("B", "kB", "MB", "GB", "TB")  # powers of 1000

LEARNS = {
    "mean": "the server learns only the (weighted) average of",
    "means": "the server learns only the (weighted) average, group by group, of",
    "call": "the server sees each client's",
    "stream": "the server sees each client's",
    "submit": "the server sees each client's",
    "exchange": "peers see each other's",
}


def privacy_statement(manifest: Mapping[str, Any]) -> list[str]:
    """What the verbs of a run give away, a sentence for each client function, from `manifest["privacy"]`.

    Evaluation is not in it: it belongs to the experiment, not to the method.
    """
    sentences = [_gives_away(use["verb"], use["function"], use["fields"]) for use in manifest.get("privacy", ())]
    if not sentences:
        running = manifest.get("status") == "running"
        sentences = ["Not known before the run has ended." if running else "No client sent anything."]
    if shared := manifest.get("shared_data"):
        told = f"{counted(shared['samples'], 'sample')} without labels"
        sentences = [
            f"{told} are public: the server and every client have them (sent once, {size(shared['bytes'])} a client).",
            *sentences,
        ]
    promised = manifest.get("dp", ["No differential privacy: no guarantee."])
    if leak := manifest.get("membership"):
        attack = (
            f"A membership attack on losses finds {leak['hits']:.1%} of the training samples at 1 % false alarms "
            f"(no attack can find more than {leak['bound']:.1%}); area under its curve {leak['auc']:.3f}."
        )
        promised = [*promised, attack]
    return [*sentences, *promised, *manifest.get("channel", ())]


def how_chosen(row: Mapping[str, Any]) -> str:
    """By what the round of a result was chosen, and among which rounds."""
    by = f" {quality.named(row['chosen_by'], row).words}" if "chosen_by" in row else ""
    return f"chosen by validation{by}" + (f" after task {row['stage']} had come" if "stage" in row else "")


def apart(partition: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """What a server does not have of a run between machines, in sentences: rows, and the models of clients."""
    return [*partition.get("apart", ()), *filter(None, [manifest.get("personal")])]


def left_out(row: Mapping[str, Any]) -> list[str]:
    """Which measures of a result are of fewer clients than were judged, in sentences."""
    counts = {name.removesuffix("_left_out"): n for name, n in row.items() if name.endswith("_left_out")}
    return [
        f"The test rows of {counted(n, 'client')} do not tell {quality.named(in_column(name), row).words}, as those of "
        f"one class alone do not; {'it is' if n == 1 else 'they are'} left out of {name}."
        for name, n in counts.items()
    ]


def kept(found: Mapping[str, float]) -> str:
    """What a run on a stream of tasks kept (`runs.continual`), in a line."""
    told = {"on the tasks so far, mean": "incremental_accuracy", "forgetting": "forgetting",
            "backward transfer": "backward_transfer"}  # fmt: skip
    return ", ".join(f"{words} {percent(found[name])}" for words, name in told.items() if name in found)


def _gives_away(verb: str, function: str, fields: list[str]) -> str:
    if verb in SILENT:
        return f"{function}: nothing leaves the clients."
    if not fields:
        return f"{function}: replies without content; the server sees only who replied."
    ending = "; the server sees nothing" if verb == "exchange" else ""
    return f"{function}: {LEARNS[verb]}: {', '.join(fields)}{ending}."


def unit(largest: float) -> tuple[float, str]:
    """The unit in which numbers of bytes up to `largest` read well: bytes in one of it, and its name."""
    step = min(len(UNITS) - 1, int(math.log10(largest) / 3)) if largest >= 1 else 0
    return 1000.0**step, UNITS[step]


def hours(seconds: float) -> tuple[float, str]:
    """The unit in which such a time reads well: seconds in one of it, and its name."""
    return next(
        unit
        for unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if (seconds >= 3 * unit[0] or unit[0] == 1)
    )


def size(count: float) -> str:
    """Bytes in words: `999 B`, `386.7 kB`, `12.0 MB`."""
    divisor, name = unit(count)
    return f"{count:,.0f} B" if divisor == 1 else f"{count / divisor:,.1f} {name}"


def duration(seconds: float) -> str:
    """Seconds in words: `0.08 s`, `12.3 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def single(plain: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of rows that have a measure of one judged model, or of one test, by itself: `plain@NAME`."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(f"{plain}@")))


def named(name: str, said: str) -> str:
    """A column in words; `said` are those of its measure."""
    _, at, whose = name.partition("@")
    return f"{said} {at}{whose}" if at else said


def counted(count: int, noun: str) -> str:
    """A number with its noun: `1 round`, `1,000 rounds`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def brief(name: str) -> str:
    """The name of a method or of data, without the folders of an absolute path."""
    return Path(name).name if Path(name).is_absolute() else name


def baseline(partition: Mapping[str, Any]) -> str:
    """What a prediction that looks at no input comes to, in a sentence; nothing where the problem has none."""
    found = partition.get("baseline", {})
    values = [f"{one.words} {told(found[one.name], one.unit)}" for one in KNOWN.values() if one.name in found]
    return f"{found['of']} has, on the global test, {' and '.join(values)}." if values else ""


def told(value: float | None, unit: str) -> str:
    """A measure in the words of its unit: a share in percent, anything else as the number that it is."""
    if unit == "share":
        return percent(value)
    return "–" if value is None or not math.isfinite(value) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share in percent with one decimal: `93.2 %`; a dash where there is none."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"
