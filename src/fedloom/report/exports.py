"""The table of a comparison as text: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator
from typing import Any

from fedloom.comparison.measures import about
from fedloom.comparison.statistics import ALPHA, Interval, Paired
from fedloom.comparison.table import Row, Table
from fedloom.report import words

COSTS = (  # of the short table, beside the score, its test, and what else methods can be compared by
    "jain_index",
    "incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "rounds_to_target",
    "bytes_to_target",
    "up_bytes",
    "down_bytes",
)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what begins one, by OWASP's list
TEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
       "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}  # fmt: skip


def said(value: float | None, unit: str) -> str:
    """A number in its unit's words; a dash where there is none."""
    if value is None:
        return "–"
    if unit == "share":
        return f"{100 * value:.1f}"
    if unit == "bytes":
        return words.size(value)
    if unit == "seconds":
        return words.duration(value)
    return f"{value:.3f}" if unit == "index" else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def measure(row: Row, name: str) -> str:
    """The mean of a measure; with how many of the seeds have it, where not all do."""
    found = row.measures[name]
    text = said(found.mean, about(name).unit)
    have, of = len(found.values), len(row.seeds)
    return f"{text} ({have}/{of})" if 0 < have < of else text


def score(value: Interval, unit: str = "share") -> str:
    """A mean with half its interval, of shares in percent: `93.2 ± 1.4`."""
    if value.mean is None:
        return "–"
    return said(value.mean, unit) + (" (one seed)" if value.half is None else f" ± {said(value.half, unit)}")


def gap(value: float, unit: str) -> str:
    """A difference of two measures, of shares in points: `+1.4`."""
    return f"{100 * value:+.1f}" if unit == "share" else f"{value:+,.4g}"


def headed(name: str) -> str:
    """A measure at the head of a column: shares are in percent."""
    return about(name).words + (", %" if about(name).unit == "share" else "")


def tested(test: Paired | None) -> str:
    """A test in a word: its corrected p, or why there is none."""
    if test is None:
        return "–"
    if test.holm is None:
        return test.why or "–"
    return "<0.001" if test.holm < 0.001 else f"{test.holm:.3f}"


def state(row: Row) -> str:
    """What of a row is missing: the seeds that failed, with the first error, and those that are not done."""
    told = []
    if row.errors:
        seed, error = next(iter(row.errors.items()))
        told.append(f"{words.counted(len(row.errors), 'seed')} failed (seed {seed}: {error})")
    if row.unfinished:
        told.append(f"{words.counted(len(row.unfinished), 'seed')} not done")
    return "; ".join(told)


def wide_columns(table: Table) -> list[str]:
    """The columns of the short table of which any row has a number."""
    return table.having(*table.metrics, *COSTS)


def markdown(table: Table, notes: list[str]) -> str:
    """A table a setting."""
    parts = []
    columns, unit = wide_columns(table), about(table.metric).unit
    for setting in dict.fromkeys(row.setting for row in table.rows):
        reference = table.references.get(setting, "–")
        head = [
            "method",
            about(table.metric).words + (" (%)" if unit == "share" else ""),
            f"p against {reference} (Holm)",
            "effect g",
        ]
        head += [about(name).words + (" (%)" if about(name).unit == "share" else "") for name in columns]
        parts += [f"## {_plain(setting)}", "", _piped(head), _piped(["---"] * len(head))]
        for row in table.of(setting):
            told = state(row)
            mine = f"**{score(row.score, unit)}**" if row.leads else score(row.score, unit)
            mine += f" ({told})" if told else ""
            p = "(the reference)" if row.method == reference else tested(row.test)
            cells = [row.method, mine, p, _effect(row.test)]
            parts.append(_piped(cells + [measure(row, name) for name in columns]))
        parts.append("")
    return "\n".join(["# Comparison", "", *parts, *(f"- {_plain(note)}" for note in notes), ""])


def rows_csv(table: Table) -> str:
    """A line a setting and method, every digit: mean, low, high and n of each measure."""
    file = io.StringIO()
    names = ["setting", "method", "metric", "mean", "low", "high", "seeds", "leads", "reference", "difference", "p",
             "p_holm", "effect_g", "why_no_p", "state"]  # fmt: skip
    for name in table.measures:
        names += [name, f"{name}_low", f"{name}_high", f"{name}_n"]
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows({name: harmless(value) for name, value in row.items()} for row in _flat(table))
    return file.getvalue()


def latex(table: Table) -> str:
    """One booktabs table: a row a method, a column a setting; bold with its interval: not significantly worse."""
    settings = list(dict.fromkeys(row.setting for row in table.rows))
    methods = list(dict.fromkeys(row.method for row in table.rows))
    found = {(row.setting, row.method): row for row in table.rows}
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'c' * len(settings)}}}",
        "\\toprule",
        " & ".join(["Method", *map(_tex, settings)]) + r" \\",
        "\\midrule",
    ]
    for method in methods:
        cells = [_tex(method)]
        for setting in settings:
            row = found[setting, method]
            inside = score(row.score, about(table.metric).unit).replace(" ± ", r" \pm ")
            if row.score.mean is None:
                cells.append("failed" if row.errors else "--")
            elif row.score.half is None:
                cells.append(_tex(inside))
            else:
                cells.append(f"$\\mathbf{{{inside}}}$" if row.leads else f"${inside}$")
        lines.append(" & ".join(cells) + r" \\")
    test = f"paired {'t' if table.test == 't' else 'Wilcoxon'} test, Holm, {ALPHA:g}"
    measured = about(table.metric, table.qualities)
    caption = f"{measured.words}{' in percent' if measured.unit == 'share' else ''}, mean and 95 % interval over seeds"
    worse = "above" if measured.better == "low" else "below"
    bold = f"% {caption}; bold: not significantly {worse} the best ({test})"
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", bold, ""])


def _flat(table: Table) -> Iterator[dict[str, Any]]:
    for row in table.rows:
        t = row.test
        flat: dict[str, Any] = {
            "setting": row.setting,
            "method": row.method,
            "metric": table.metric,
            "mean": row.score.mean,
            "low": row.score.low,
            "high": row.score.high,
            "seeds": len(row.seeds),
            "leads": row.leads,
            "reference": table.references.get(row.setting),
            "difference": t and t.difference.mean,
            "p": t and t.p,
            "p_holm": t and t.holm,
            "effect_g": t and t.effect,
            "why_no_p": t and t.why,
            "state": state(row),
        }
        for name, value in row.measures.items():
            flat |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
            flat[f"{name}_n"] = len(value.values)
        yield flat


def harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: a label may begin with =, +, - or @."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _plain(text: str) -> str:
    """Text in Markdown: a label's brackets open no HTML."""
    return html.escape(text, quote=False).replace("\n", " ").replace("\r", " ")


def _effect(test: Paired | None) -> str:
    return "–" if test is None or test.effect is None else f"{test.effect:+.2f}"


def _piped(cells: list[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", r"\|") for cell in cells) + " |"


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)
