"""Writes the pages that come from the code: methods, modules, settings, commands, claims, networks, notebooks.

mkdocs-gen-files runs this file at every build. A method's page shows what its file says, and what two rounds of it
send (`traffic.py`).
"""

import ast
import csv
import re
import sys
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

import mkdocs_gen_files
import torch

from fedloom.method import Method
from fedloom.nets import describe
from fedloom.plugin import Plugin
from fedloom.registry import Entry, catalogue

sys.path.insert(0, str(Path(__file__).resolve().parent))
import chooser
import notebooks
from layout import picture
from reference import cell, code, commands_page, extras_table, settings_page
from traffic import Traffic, measured

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "benchmarks" / "results" / "claims.csv"
SOURCE = ROOT / "src" / "fedloom"
HEADING = re.compile(r"^(Departures|Identities):\s*", re.MULTILINE)
ARXIV = re.compile(r"\barXiv[: ]\s*(\d{4}\.\d{4,5})")
RUNS = ("runs.experiment", "runs.record", "runs.spec")
CORE = ("vector", "message", "evaluator", "node", "cohort", "method", "ranges", "task", "world", "api", *RUNS)
PUBLIC = (*CORE, "tasks.classification", "data.load", "data.partition", "nets", "errors", "random", "testing")


def write(page: str, text: str) -> None:
    """One generated page or picture."""
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text.rstrip() + "\n")


def sections(doc: str) -> tuple[str, str, str, dict[str, str]]:
    """A method's docstring as (question, citation, box, {"Departures": text, "Identities": text}).

    The first paragraph is the question; before the headings, what is indented is the paper's box and the rest is the
    citation.
    """
    head, *rest = HEADING.split(doc)
    question, _, body = head.strip().partition("\n\n")
    indented = [not line or line.startswith("    ") for line in body.splitlines()]
    box = "\n".join(line for line, inside in zip(body.splitlines(), indented, strict=True) if inside)
    citation = "\n".join(line for line, inside in zip(body.splitlines(), indented, strict=True) if not inside)
    return question, citation, dedent(box).strip("\n"), dict(zip(rest[::2], rest[1::2], strict=True))


def linked(text: str) -> str:
    """Markdown whose arXiv identifiers are links."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text.strip())


def points(text: str) -> str:
    """The points "1. ... 2. ..." of a section, which a docstring runs together, as a Markdown list."""
    text, number = " " + " ".join(linked(text).split()), 1
    while f" {number}. " in text:
        text = text.replace(f" {number}. ", f"\n{number}. ", 1)
        number += 1
    return text.strip()


def method_page(entry: Entry) -> str:
    """One method: what its docstring says, its fields, and the file itself."""
    question, citation, box, notes = sections(entry.doc)
    rows = "".join(
        f"| {code(name)} | {code(kind)} | {code(default)} | {cell(comment)} |\n"
        for name, kind, default, comment in entry.fields()
    )
    parts = [
        f"# {entry.name}\n\n**{question}**\n\n{linked(citation)}",
        f"## [Box](../../glossary.md#box)\n\n```text\n{box}\n```" if box else "",
        f"## Fields\n\nEach is a flag of `fedloom run {entry.name}`.\n\n"
        f"| field | type | default | meaning |\n| --- | --- | --- | --- |\n{rows}"
        if rows
        else "",
        f"## Needs, refuses, declares\n\n{declarations(entry)}",
        f"## Sent and kept\n\n{traffic(measured(entry))}",
        *(f"## [{heading}](../../glossary.md#{heading.lower()})\n\n{points(text)}" for heading, text in notes.items()),
        f"## Evidence\n\n{evidence(entry)}",
        f'## File\n\n```python title="{entry.path.relative_to(ROOT)}"\n{entry.path.read_text(encoding="utf-8")}```',
    ]
    return "\n\n".join(part for part in parts if part)


def declarations(entry: Entry) -> str:
    """What a method's class says of problems, settings and reply fields."""
    cls = entry.load(Method)
    plugin = issubclass(cls, Plugin)
    inner = "as for the inner method"
    known = [
        ("needs", ", ".join(f"`{need}`" for need in cls.needs) or "nothing but clients with data"),
        ("incompatible with", "; ".join(f"`{name}`: {why}" for name, why in cls.refuses.items()) or "nothing"),
        ("may be compressed", inner if plugin else fields_in_words(cls.compressible)),
        ("may be made private", inner if plugin else fields_in_words(cls.private)),
        (
            "searched by `--tune`",
            "; ".join(f"`{name}` {bounds(r)}" for name, r in cls.search_space().items()) or "nothing",
        ),
    ]
    return "| | |\n| --- | --- |\n" + "".join(f"| {name} | {cell(text)} |\n" for name, text in known)


def fields_in_words(names: tuple[str, ...]) -> str:
    """Names of reply fields, or that there are none."""
    return ", ".join(f"`{name}`" for name in names) or "no field of its replies"


def bounds(r: tuple[object, ...]) -> str:
    """Where a search looks."""
    if len(r) == 3 and r[2] in ("log", "linear"):
        return f"{r[0]} to {r[1]} ({r[2]})"
    return "in " + ", ".join(map(str, r))


def traffic(seen: Traffic | str) -> str:
    """The table of messages, what they come to, and what stays."""
    if isinstance(seen, str):
        return f"Not measured in this build: {seen}"
    rows = "".join(
        f"| {when} | {code(function)} | {code(verb)} | {direction} | "
        f"{', '.join(f'{code(name)} {size}' for name, size in fields.items()) or 'nothing'} | {size} |\n"
        for when, function, verb, direction, fields, size in seen.rows
    )
    kept = {who: ", ".join(map(code, names)) or "nothing" for who, names in seen.kept.items()}
    total = ", ".join(f"{size:,.0f} {name}" for name, size in seen.rounds.items() if size or name != "peer")
    table = (
        "| when | function | verb | way | fields, bytes | message, bytes |\n"
        f"| --- | --- | --- | --- | --- | --- |\n{rows}\n"
    )
    return (
        f"Measured with the defaults on the contract's small problem: {seen.clients} clients, a global model of "
        f"{seen.numbers} numbers, 2 rounds. {'' if rows else 'No message is sent.'}\n\n{table if rows else ''}"
        f"Bytes per client and round: {total.replace(' peer', ' to peers')}. "
        f"A message has 5 bytes in addition to its fields.\n\n"
        f"A client keeps {kept['client']}; the server {kept['server']}."
    )


def claims() -> list[dict[str, str]]:
    """The rows of the table of claims, none if it is not there."""
    if not CLAIMS.exists():
        return []
    with CLAIMS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def evidence(entry: Entry) -> str:
    """What came out where the method's claim was tried."""
    found = [row for row in claims() if row["method"] == entry.name]
    if not found:
        return "Its claim has not been tested here on real data."
    (row,) = found
    claim = row["claim"][:1].upper() + row["claim"][1:]
    shown = ("setting", "measure", "result", "rivals", "difference", "verdict", "note")
    table = "".join(f"| {name} | {cell(row[name])} |\n" for name in shown if row[name])
    return f"{claim} See [all claims](../../claims.md).\n\n| | |\n| --- | --- |\n{table}"


def write_claims() -> None:
    """The page of claims: how they were tried, and the whole table."""
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    folders = {entry.name: entry.folder for entry in catalogue()}
    rows = "".join(
        f"| {f'[{name}](methods/{folders[name]}/{name}.md)' if (name := row['method']) in folders else name} | "
        + " | ".join(cell(row[column]) for column in ("claim", "setting", "measure", "result", "rivals"))
        + f" | {cell(row['difference'])} | **{row['verdict']}** | {cell(row['note'])} |\n"
        for row in claims()
    )
    head = "| method | claim | setting | measure | result | rivals | difference | verdict | note |\n"
    table = f"{head}|{' --- |' * 9}\n{rows}" if rows else "No claim has been tested yet."
    write("claims.md", page.replace("<!-- the table of claims -->", table))


def write_methods() -> None:
    """A page a method, the table of all, and their navigation, by folder."""
    index = "# Methods\n\nOne file per paper, in folders by the question that it answers.\n"
    navigation = "- [All methods](index.md)\n"
    by_folder = sorted(catalogue(), key=lambda entry: (entry.folder, entry.name))
    for folder, entries in groupby(by_folder, key=lambda entry: entry.folder):
        home = SOURCE / "methods" / folder / "__init__.py"
        question = ast.get_docstring(ast.parse(home.read_text(encoding="utf-8")))
        index += f"\n## {folder}\n\n{question}\n\n| method | question |\n| --- | --- |\n"
        navigation += f"- {folder}\n"
        for entry in entries:
            write(f"methods/{folder}/{entry.name}.md", method_page(entry))
            index += f"| [{entry.name}]({folder}/{entry.name}.md) | {cell(entry.question)} |\n"
            navigation += f"    - [{entry.name}]({folder}/{entry.name}.md)\n"
    write("methods/index.md", index)
    write("methods/SUMMARY.md", navigation)


def write_api() -> None:
    """A page a module, those that users meet first; the methods have pages of their own."""
    modules = [path.relative_to(SOURCE).with_suffix("").parts for path in SOURCE.rglob("*.py")]
    library = [parts for parts in modules if parts[0] not in ("__init__", "__main__", "cli", "methods")]
    names = {".".join(part for part in parts if part != "__init__") for parts in library}
    inner = sorted(names - set(PUBLIC))
    for name in (*PUBLIC, *inner):
        found = "boost: 0.5" if name in PUBLIC else "exclude: true"  # a search shows the pages for readers first
        write(f"api/{name}.md", f"---\nsearch:\n  {found}\n---\n\n# fedloom.{name}\n\n::: fedloom.{name}")
    navigation = [f"- [{name}]({name}.md)" for name in PUBLIC]
    navigation += ["- internals", *(f"    - [{name}]({name}.md)" for name in inner)]
    write("api/SUMMARY.md", "\n".join(navigation))


def write_networks() -> None:
    """The table of networks, put where `networks.md` asks for it."""
    rows = "".join(f"| {code(name)} | {cell(line)} | {needs} |\n" for name, line, needs in describe())
    table = f"| `--model` | network | reads |\n| --- | --- | --- |\n{rows}"
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    write("networks.md", page.replace("<!-- the table of networks -->", table))


def write_installation() -> None:
    """The table of extras, put where `installation.md` asks for it."""
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    write("installation.md", page.replace("<!-- the table of extras -->\n", extras_table()))


def write_chooser() -> None:
    """The methods by situation, put where `choosing.md` asks for them."""
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    verdicts = {row["method"]: row["verdict"] for row in claims()}
    write("choosing.md", page.replace("<!-- the situations -->", chooser.sections(catalogue(), verdicts)))


def write_notebooks() -> None:
    """The notebooks, with what came out when this build carried them out."""
    for name in notebooks.names():
        with TemporaryDirectory() as folder:
            text, pictures = notebooks.page(name, notebooks.executed(name, Path(folder)))
        source = f"This page is the notebook `examples/{name}.ipynb`, with the results of this build."
        write(f"notebooks/{name}.md", text.replace("\n\n", f"\n\n{source}\n\n", 1))
        for file, data in pictures.items():
            with mkdocs_gen_files.open(f"notebooks/{file}", "wb") as opened:
                opened.write(data)


torch.set_num_threads(1)
write("settings.md", settings_page())
write("cli.md", commands_page())
write("layout.svg", picture((ROOT / "docs" / "layout.md").read_text(), SOURCE))
write_methods()
write_claims()
write_api()
write_networks()
write_installation()
write_notebooks()
write_chooser()
