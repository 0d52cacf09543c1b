"""What the command line prints about runs, methods and data."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.comparison.measures import qualities_in
from fedloom.letters import printable
from fedloom.quality import ACCURACY, Quality, chooser_of, evaluated
from fedloom.report.room import fits
from fedloom.report.words import (
    apart,
    baseline,
    counted,
    duration,
    how_chosen,
    kept,
    left_out,
    named,
    privacy_statement,
    single,
    size,
)
from fedloom.runs.continual import continual
from fedloom.runs.reading import understood

if TYPE_CHECKING:
    from fedloom.cli.flags import Flag
    from fedloom.registry import Entry
    from fedloom.runs.record import Run

WIDE = 160  # columns, where nothing says how wide the output is
SHOWN = 50  # clients in a table
NAMED = 12  # columns of one use, in a line
USES = {"label": "label", "client": "client", "series": "series", "time": "time", "metadata": "metadata",
        "number": "numbers", "category": "categories", "date": "dates", "text": "text", "image": "images",
        "ignored": "ignored"}  # fmt: skip
BARS = " ▁▂▃▄▅▆▇█"


def console(stderr: bool = False) -> Console:
    """Where to print: what comes from data is never taken for markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDE  # which a shell passes on only if told to
    return Terminal(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


class Terminal(Console):
    """Where text from data steers nothing, and a run does not end because nobody reads what it prints."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Text of a line or of a cell of a table."""
        return super().render_str(printable(text), **how)

    def on_broken_pipe(self) -> None:
        """The reader, such as `head`, has seen enough: what else there is goes nowhere, and the run goes on."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def summary(run: Run) -> dict[str, Any]:
    """What `run`, `resume` and `show` say about a run, for programs."""
    with understood(run.path):
        metrics, spec, manifest = run.metrics, dataclasses.asdict(run.spec), run.manifest
        judged = any(map(evaluated, metrics))
        report = run.path / "report.html"
        names = ("seconds", "eval_seconds", "up_bytes", "down_bytes", "peer_bytes", "eval_up_bytes", "eval_down_bytes")
        return {
            "path": str(run.path),
            "status": manifest.get("status"),
            "rounds": metrics[-1]["round"] if metrics else 0,
            "selected": run.selected if judged else None,
            "final": run.final if judged else None,
            **{name: sum(row.get(name, 0) for row in metrics) for name in names},
            **({"labels": sum(row["labels"] for row in metrics)} if metrics and "labels" in metrics[-1] else {}),
            "left_out": [*apart(run.partition, manifest), *(left_out(run.selected) if judged else [])],
            "baseline": baseline(run.partition),
            "privacy": privacy_statement(manifest),
            "continual": continual(run),
            "report": str(report) if report.exists() else None,
            "spec": spec,
            "manifest": manifest,
        }


def print_results(out: Console, found: Mapping[str, Any]) -> None:
    """The results, a line a round where that fits, else a line a measure."""
    wide = results(found)
    out.print(wide if fits(out, wide) else _tall(found))
    for line in found["left_out"]:
        out.print(line, soft_wrap=True)


def results(found: Mapping[str, Any]) -> Table:
    """The round that the validation rows choose, and the last one."""
    rows, measured = _told(found)
    table = _table("", "round", *measured)
    for words, row in rows.items():
        table.add_row(words, str(row["round"]), *(_number(row.get(name)) for name in measured.values()))
        each = [single(name, [row]) for name in measured.values()]
        for whose in dict.fromkeys(name.partition("@")[2] for names in each for name in names):
            table.add_row(f"  @{whose}", "", *(_number(row.get(f"{name}@{whose}")) for name in measured.values()))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _tall(found: Mapping[str, Any]) -> Table:
    """The same with a line a measure."""
    rows, measured = _told(found)
    table = _table("", *rows)
    table.add_row("round", *(str(row["round"]) for row in rows.values()))
    for words, name in measured.items():
        for one in (name, *single(name, list(rows.values()))):
            table.add_row(named(one, words), *(_number(row.get(one)) for row in rows.values()))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _told(found: Mapping[str, Any]) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """The rounds that are told, by their heads, and the columns of the record that they have, by theirs."""
    selected, final = found["selected"], found["final"]
    if final[f"validation_{chooser_of(final).name}"] is None:
        rows = {"last (nothing set aside to choose by)": final}
    elif selected["round"] == final["round"]:
        rows = {f"{how_chosen(final)}, and last": final}
    else:
        rows = {how_chosen(selected): selected, "last": final}
    having = {name for row in rows.values() for name, value in row.items() if value is not None}
    return rows, {words: name for words, name in _measures(qualities_in([final]), having).items() if name in having}


def _measures(qualities: Sequence[Quality], having: Collection[str]) -> dict[str, str]:
    """The columns of the record that a table of results has, by their heads."""
    main, *others = qualities
    said = "" if main == ACCURACY else f" {main.words}"
    return {
        f"global test{said}": f"global_test_{main.name}",
        **{one.words: f"global_test_{one.name}" for one in others},
        "loss": "global_test_loss",
        f"personal test{said}": f"personal_test_{main.name}",
        **{
            f"personal {one.words}": f"personal_test_{one.name}" for one in others if f"validation_{one.name}" in having
        },
        "± over clients": f"personal_test_{main.name}_std",
        "newcomers": f"newcomer_test_{main.name}",
        "worst client": f"worst_client_{main.name}",
        "validation": f"validation_{main.name}",
        "validation loss": "validation_loss",
        **{f"validation {one.words}": f"validation_{one.name}" for one in others},
    }


def spent(found: Mapping[str, Any]) -> str:
    """Rounds, time and payload bytes, in one line."""
    carried = f"{size(found['up_bytes'])} up, {size(found['down_bytes'])} down"
    carried += f", {size(found['peer_bytes'])} between peers" if found["peer_bytes"] else ""
    carried += f"; {counted(found['labels'], 'label')} asked for" if "labels" in found else ""
    times = f"{found['rounds']} rounds in {duration(found['seconds'])}, evaluation {duration(found['eval_seconds'])}"
    return f"{times}; {carried}"


def print_run(found: Mapping[str, Any]) -> None:
    """All that `show` says."""
    spec, manifest = found["spec"], found["manifest"]
    method = dict(spec["method"])
    name, data, partition = method.pop("name"), spec["data"], spec["partition"]
    others = {key: value for key, value in spec.items() if key not in ("method", "data", "partition", "rounds")}
    on = f"fedloom resume {shlex.quote(found['path'])}"
    status = {
        "finished": "finished",
        "running": f"running, or killed; in that case go on with: {on}",
        "stopped": f"stopped; go on with: {on}",
        "failed": f"failed; go on with: {on}",
    }.get(found["status"], "unknown")
    evaluation = f"{size(found['eval_up_bytes'])} up, {size(found['eval_down_bytes'])} down"
    lines = {
        "run": found["path"],
        "what": f"{name} on {data}, {partition}",
        "fields": _assigned(method) or "none",
        "settings": _assigned(others),
        "started": f"{manifest.get('started', 'unknown')}, fedloom {manifest.get('fedloom', 'unknown')}",
        "status": f"{found['rounds']} of {spec['rounds']} rounds; {status}",
        "spent": f"{spent(found)} (and for evaluation {evaluation})",
        "privacy": "\n".join(found["privacy"]),
        **({"stream": kept(found["continual"])} if found["continual"] else {}),
        "report": found["report"] or f"none yet; write it with: fedloom report {shlex.quote(found['path'])}",
    }
    grid = Table.grid(padding=(0, 2))
    for key, value in lines.items():
        grid.add_row(Text(key, "bold"), value)
    out = console()
    out.print(grid)
    out.print()
    if found["final"]:
        print_results(out, found)
    else:
        out.print("no round has been evaluated yet")
    if found["baseline"]:
        out.print(found["baseline"], soft_wrap=True)


def print_methods(entries: Iterable[Entry]) -> None:
    """A line a method."""
    table = _table("method", "group", "question")
    for entry in entries:
        table.add_row(Text(entry.name, "bold"), entry.home, entry.question)
    console().print(table)


def print_method(entry: Entry, flags: Sequence[Flag]) -> None:
    """A method's docstring and its fields."""
    out = console()
    out.print(Text(entry.name, "bold"), f"({entry.home or 'a file of yours'}, {entry.path})", soft_wrap=True)
    out.print(f"\n{entry.doc}\n", soft_wrap=True)
    table = _table("field", "type", "default", "")
    for flag in flags:
        table.add_row(Text(f"--{flag.name}", "bold"), flag.kind, flag.default, flag.comment)
    out.print(table)


def print_partition(data: str, dealt: Mapping[str, Any]) -> None:
    """What every client got: how many rows, and of which classes, as a row of bars."""
    clients, classes = dealt["clients"], dealt["classes"]
    named = any(client["name"] != str(client["id"]) for client in clients)
    noted = any(client["note"] for client in clients)
    most = max(max(client["labels"]) for client in clients)
    span = _plain(classes[0] if len(classes) == 1 else f"{classes[0]} … {classes[-1]}")
    table = _table("client", *(["name"] * named), "train", "validation", "test", span, "classes", *(["note"] * noted))
    held = [sum(map(bool, client["labels"])) for client in clients]
    for client, kinds in zip(clients[:SHOWN], held, strict=False):
        sizes = [str(client[split]) for split in ("train", "validation", "test")]
        bars = "".join(BARS[-(-count * (len(BARS) - 1) // most) if most else 0] for count in client["labels"])
        called, note = [_plain(client["name"])] * named, [_plain(client["note"])] * noted
        table.add_row(str(client["id"]), *called, *sizes, bars, str(kinds), *note)
    out = console()
    print_columns(out, dealt)
    out.print(table)
    if len(clients) > SHOWN:
        out.print(f"... and {dealt['population'] - SHOWN} clients more")
    rows = [client["train"] for client in clients]
    those = "" if len(clients) == dealt["population"] else f"; these numbers are of the first {len(clients)}"
    those += f"; {len(dealt['newcomers'])} newcomers beside them" if "newcomers" in dealt else ""
    out.print(
        f"{data}, {dealt['partition']}: {dealt['population']} clients with {_range(rows)} training rows"
        f" (median {median(rows):g}, together {sum(rows)}) of {_range(held)} out of {len(classes)} classes{those}",
        soft_wrap=True,
    )


def print_columns(out: Console, dealt: Mapping[str, Any]) -> None:
    """What every column of the data is used as: a line a use, and one for each column that is ignored.

    Then how many rows each class has, and what else was decided, a line each.
    """
    columns: Sequence[Mapping[str, str]] = dealt.get("columns", ())
    for role, use in USES.items():
        those = [_plain(f"{c['name']}: {c['note']}" if c["note"] else c["name"]) for c in columns if c["role"] == role]
        noted = role == "ignored" or any(c["note"] for c in columns if c["role"] == role)
        lines = those if role == "ignored" else ["; ".join(those) if noted else ", ".join(those)]
        if len(those) > NAMED:
            more = f"and {len(those) - NAMED} more"
            lines = [*those[:NAMED], more] if role == "ignored" else [f"{', '.join(those[:NAMED])} {more}"]
        for line in filter(None, lines):
            out.print(f"{use:10} {line}", soft_wrap=True, style="dim")
    counts = [
        f"{_plain(str(name))} {rows:,}"
        for name, rows in zip(dealt.get("classes", ()), dealt.get("counts", ()), strict=False)
    ]
    if counts:
        more = f" and {len(counts) - NAMED} more" if len(counts) > NAMED else ""
        out.print(f"{'rows':10} {', '.join(counts[:NAMED])}{more}", soft_wrap=True, style="dim")
    for decision in dealt.get("decisions", ()):
        out.print(f"{'decided':10} {_plain(decision)}", soft_wrap=True, style="dim")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in ("train", "validation", "test") else "left")
    return table


def _assigned(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def _plain(text: str) -> str:
    return text if text.isprintable() else ascii(text)


def print_runs(found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Runs, a line each: with what they measured where they did."""
    out = console()
    if not found:
        out.print(f"no runs in {folder}", soft_wrap=True)
    for one in found:
        if "error" in one:
            out.print(f"{one['run']}: {one['error']}", soft_wrap=True)
            continue
        value = f", {one['measure'].replace('_', ' ')} {one['value']:.4f}" if one["value"] is not None else ""
        about = f"{one['method']} on {one['data']}, {counted(one['clients'], 'client')}, seed {one['seed']}"
        out.print(f"{one['run']}: {about}; {one['rounds']} rounds, {one['status']}{value}", soft_wrap=True)
