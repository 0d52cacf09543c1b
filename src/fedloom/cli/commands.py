"""The commands. Each imports what it needs when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom._version import __version__
from fedloom.cli import certs, comparing, deploying, output, using
from fedloom.cli.running import carried_out, tell_end
from fedloom.errors import RunError, TakenError, UsageError, unknown

if TYPE_CHECKING:
    from fedloom.runs.experiment import Experiment

DEBUG = "Add --debug anywhere to see the traceback of an error."
DEALING = (
    "problem",
    "label",
    "exclude",
    "keep",
    "metadata",
    "missing",
    "sep",
    "encoding",
    "decimal",
    "resize",
    "windows",
    "group",
    "partition",
    "clients",
    "newcomers",
    "validation",
    "test_share",
    "seed",
)  # the settings of `data`
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="NAME=VALUE", help="Settings, such as rounds=100 or method.lr=0.1.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


NAMES = {"listing": "list"}  # a name that Python has for itself


def app(words: Sequence[str]) -> typer.Typer:
    """The commands, in which the flags of `run` are those of the method that the command line's words name."""
    made = typer.Typer(add_completion=False)
    made.callback(help="Federated learning in which every algorithm is one short file.", epilog=DEBUG)(top)
    run_flagged, data_flagged = _flagged(words)
    made.command("run", epilog=f"Name a method before --help to list its fields too. {DEBUG}")(run_flagged)
    listed: list[Callable[..., None]] = [resume, *comparing.commands(words), listing, show, report]
    listed += [using.predict, using.export, methods, data_flagged, check]
    listed += [deploying.columns, deploying.server, deploying.client, deploying.replay]
    for command in listed:
        made.command(NAMES.get(command.__name__), epilog=DEBUG)(command)
    made.add_typer(certs.app(DEBUG, not words or words[0] == "certs"), name="certs")
    return made


def _flagged(words: Sequence[str]) -> tuple[Callable[..., None], Callable[..., None]]:
    """`run` and `data` with the flags of their settings, for which only these two wait."""
    if not {"run", "data"} & set(words):
        return run, data
    from fedloom.cli.flags import entry, flags_of, positionals, with_flags

    command, *named = [*positionals(words), ""]
    method = entry(named[0], named[1:]) if command == "run" and named[0] else None
    dealing = [flag for flag in flags_of(None) if flag.setting in DEALING]
    return with_flags(run, flags_of(method)), with_flags(data, dealing)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedloom {__version__}")
        raise typer.Exit


def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Global options."""


def run(
    target: Annotated[
        str,
        typer.Argument(
            metavar="METHOD|FILE.py|SPEC.yaml",
            help="Name of a method, its file, with fields if need be (fedprox:mu=0.1), or the spec of a run.",
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the run (default: runs/METHOD-DATA-NUMBER).")] = None,
    as_json: output.Json = False,
) -> None:
    """Train a model; write it, its metrics and a report to a folder."""
    from fedloom.cli.flags import resolved
    from fedloom.cli.progress import Watch
    from fedloom.runs.record import Run

    Run.require_absent(out)  # told before the data are read
    spec = resolved(target, overrides or ())
    with Watch(quiet=as_json) as watch:
        from fedloom.runs.experiment import Experiment

        experiment = _begun(Experiment(spec), out)
        with experiment.record.lock():
            ended = carried_out(experiment, watch)
    tell_end(ended, as_json)


def resume(
    path: RunFolder,
    rounds: Annotated[int | None, typer.Option(help="Go on to so many rounds in all, more than the run had.")] = None,
    trust: comparing.Trust = False,
    as_json: output.Json = False,
) -> None:
    """Resume a stopped or killed run, or go on with a finished one for more rounds."""
    from fedloom.cli.progress import Watch
    from fedloom.runs.record import Run

    record = Run(path)
    with Watch(quiet=as_json) as watch:
        from fedloom.api import check_inputs, taken_up

        with record.lock():
            changes = check_inputs(record, trust)
            for line in changes:
                typer.echo(f"fedloom: {line}", err=True)
            ended = carried_out(taken_up(record, None, rounds, changes), watch)
    tell_end(ended, as_json)


def listing(
    folder: Annotated[Path, typer.Argument(help="Folder to look in, and in the folders below it.")] = Path("runs"),
    as_json: output.Json = False,
) -> None:
    """List the runs in a folder: method, data, how far they came, and their result."""
    from fedloom.cli.tables import print_runs
    from fedloom.runs.outline import damaged_outline, folders, outline
    from fedloom.runs.record import Run

    found = []
    for path in folders(folder):
        try:
            found.append(outline(Run(path)))
        except (RunError, UsageError) as error:
            found.append(damaged_outline(path, error))
    output.tell_json(found) if as_json else print_runs(found, folder)


def show(path: RunFolder, as_json: output.Json = False) -> None:
    """Show a run's settings, progress and results."""
    from fedloom.cli.tables import print_run, summary
    from fedloom.runs.record import Run

    found = summary(Run(path))
    output.tell_json(found) if as_json else print_run(found)


def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or of a comparison.")],
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    pictures: Annotated[Path | None, typer.Option(help="Folder for the pictures of the page, each a file.")] = None,
    form: Annotated[str, typer.Option("--format", help="Form of these files: svg, pdf or png.")] = "svg",
) -> None:
    """Write the report of a run, or of a comparison, again and print its path."""
    import webbrowser

    from fedloom.api import load
    from fedloom.report import comparison as of_comparison
    from fedloom.report import write
    from fedloom.report.picture import FORMATS, save_all
    from fedloom.runs.record import Run

    if form not in FORMATS:
        raise unknown("format of pictures", form, FORMATS)
    made = load(path)
    page = write(made) if isinstance(made, Run) else of_comparison.write(made)
    if pictures is not None:
        for file in save_all(made.pictures if isinstance(made, Run) else of_comparison.pictures(made), pictures, form):
            typer.echo(file)
    typer.echo(page)
    if open_it:
        webbrowser.open(page.resolve().as_uri())


def methods(
    word: Annotated[str | None, typer.Argument(help="Name of a method to describe, or a word to search for.")] = None,
    as_json: output.Json = False,
) -> None:
    """List the methods and the question that each answers."""
    from fedloom.cli.flags import entry, flags_of
    from fedloom.cli.tables import print_method, print_methods
    from fedloom.registry import METHODS
    from fedloom.registry import entries as every_entry

    entries = every_entry()
    exact = word and (word.endswith(".py") or word in METHODS)
    if word:
        entries = (entry(word),) if exact else tuple(e for e in entries if word.lower() in f"{e.name} {e.doc}".lower())
    if not entries:
        raise unknown("method or word in one", word, METHODS)
    if as_json:
        keys = ("name", "type", "default", "comment")
        output.tell_json(
            [
                {"name": one.name, "group": one.home, "question": one.question, "doc": one.doc, "path": str(one.path)}
                | {"fields": [dict(zip(keys, field, strict=True)) for field in one.fields()]}
                for one in entries
            ]
        )
    elif exact:
        print_method(entries[0], [flag for flag in flags_of(entries[0]) if flag.setting.startswith("method.")])
    else:
        print_methods(entries)


def data(
    name: Annotated[
        str, typer.Argument(metavar="DATA", help="Data set: digits, breast_cancer, a file, a folder, or hf:NAME.")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="File for a figure: .png, .pdf or .svg.")] = None,
    as_json: output.Json = False,
) -> None:
    """Show what every client gets, as a table and as a figure."""
    from fedloom.cli.tables import print_partition
    from fedloom.runs.spec import Spec, with_overrides

    spec = Spec.of(with_overrides({"data": name}, overrides or ()))
    from fedloom.report.picture import Picture, form_of

    if out is not None:
        form_of(out)  # told before the data are read
    from fedloom import tasks
    from fedloom.data import partition_figure

    dealt = tasks.build(spec).describe()
    if out is not None:
        Picture("What every client gets", "", lambda: partition_figure(dealt), themed=False).save(out)
    if as_json:
        output.tell_json({"data": name, **dealt, "picture": out and str(out)})
        return
    print_partition(name, dealt)
    if out is not None:
        typer.echo(f"picture: {out}")


def check(
    target: Annotated[
        str, typer.Argument(metavar="FILE.py|METHOD", help="File of a method, or the name of one in the library.")
    ],
    device: Annotated[str, typer.Option(help="cpu, cuda, or all: both if CUDA is available.")] = "all",
) -> None:
    """Check a method against the library's contract."""
    import torch

    from fedloom.cli.flags import entry
    from fedloom.cli.tables import console
    from fedloom.method import Method
    from fedloom.runs.fitted import device_named
    from fedloom.testing import ContractError, check_method

    out, problems = console(), []

    def tell(name: str, problem: str | None, seconds: float) -> None:
        problems.extend([problem] if problem else [])
        out.print(f"{seconds:5.1f} s  {'FAILED' if problem else 'ok    '}  {name}", style="red" if problem else "")
        if problem:
            out.print(f"         {problem}", soft_wrap=True)

    method = entry(target).load(Method)
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    places = here if device == "all" else [device_named(device)]
    try:
        for place in places:
            if place != "cpu":
                out.print(f"on {place}:")
            check_method(method, on_check=tell, device=place)
    except ContractError as broken:
        raise RunError(f"{target} breaks the contract in {len(problems)} of its checks") from broken


def _begun(experiment: Experiment, out: Path | None) -> Experiment:
    """The experiment with its record in `out`, or in the first free folder `runs/METHOD-DATA-NUMBER`."""
    spec = experiment.spec
    known = Path(spec.data).expanduser().exists()
    words = [Path(spec.method["name"]).stem, Path(spec.data).resolve().stem if known else spec.data]
    while True:
        try:
            return experiment.begin(out or output.vacant(words))
        except TakenError:  # by a run that began at the same time
            if out is not None:
                raise
