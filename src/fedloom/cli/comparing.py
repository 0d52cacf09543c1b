"""`fedloom compare` and `fedloom sweep`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli import output
from fedloom.errors import RunError, UsageError

if TYPE_CHECKING:
    from fedloom.cli.flags import Flag
    from fedloom.comparison.grid import Comparison
    from fedloom.comparison.results import Results

YAML = (".yaml", ".yml")
OURS = ("seed", "blind")  # settings of a run that a comparison decides itself

Seeds = Annotated[
    str | None, typer.Option(metavar="N or N,N,..", help="Number of seeds, or a list of them (default: 3).")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="NAME:KEY=VALUE,..", help="Setting to compare under; may be repeated."),
]
Baseline = Annotated[str | None, typer.Option(help="Method that the others are tested against (default: the best).")]
Test = Annotated[str | None, typer.Option(help="Paired significance test: t or wilcoxon.")]
Metric = Annotated[str | None, typer.Option(help="Measure by which methods are compared.")]
Target = Annotated[float | None, typer.Option(help="Accuracy up to which rounds, bytes and time are counted.")]
Jobs = Annotated[int, typer.Option(help="Number of runs in parallel, each in a process (default: one per core).")]
Out = Annotated[
    Path | None, typer.Option(help="Folder (default: runs/compare-NUMBER). An existing comparison is resumed.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Execute the method's file that the folder names even if it has changed or lies elsewhere."
    ),
]


def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD.. | SPEC.yaml | OUT",
            help="Methods (fedavg fedprox:mu=0.1 my.py), a spec, or the folder of a comparison to resume; "
            "then settings, such as rounds=100, method.lr=0.1 (all methods) or fedprox.mu=1.",
        ),
    ] = None,
    seeds: Seeds = None,
    tune: Annotated[int | None, typer.Option(help="Tuning trials per method, judged on validation data.")] = None,
    setting: Settings = None,
    baseline: Baseline = None,
    test: Test = None,
    metric: Metric = None,
    target: Target = None,
    out: Out = None,
    jobs: Jobs = 0,
    trust: Trust = False,
    as_json: output.Json = False,
) -> None:
    """Compare methods at equal seeds, settings and budgets; report which differences are statistically significant."""
    from fedloom.comparison.grid import Comparison
    from fedloom.comparison.reading import assigned, mapping
    from fedloom.inputs import foreign

    targets, assignments = _split(overrides or ())
    given: dict[str, Any]
    folder = _folder(targets)
    if folder is not None:
        given, out = _reopened(folder, out)
        if any(assignment.startswith("method.") for assignment in assignments):
            raise UsageError(f"the methods of {folder} have their fields; compare others into another --out")
    elif len(targets) == 1 and targets[0].endswith(YAML):
        given = mapping(targets[0])
    else:
        given = {"methods": targets}
    ours = {"tune": tune, "baseline": baseline, "test": test, "metric": metric, "target": target, "seeds": seeds}
    comparison = Comparison.of(assigned(given, assignments) | _set(ours) | _circumstances(setting))
    if folder is not None:
        foreign(comparison.code, folder, trust)
    with _folder_for(out, "compare", targets, comparison) as path:
        _carry_out(comparison, path, jobs, as_json, trust)


def sweep(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD | SPEC.yaml | OUT",
            help="A method, the spec of a run, or the folder of a sweep to resume; then settings, such as rounds=100.",
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V,V,..", help="Values of a field or a setting; repeat for all combinations."),
    ] = None,
    search: Annotated[
        int | None, typer.Option(help="Number of trials of a search over the declared ranges, on validation data.")
    ] = None,
    seeds: Seeds = None,
    setting: Settings = None,
    baseline: Baseline = None,
    test: Test = None,
    metric: Metric = None,
    target: Target = None,
    out: Out = None,
    jobs: Jobs = 0,
    trust: Trust = False,
    as_json: output.Json = False,
) -> None:
    """Run one method over a grid or a search space; report the values chosen on validation data."""
    from fedloom.comparison.grid import Comparison
    from fedloom.comparison.reading import mapping
    from fedloom.comparison.sweep import sweep_comparison
    from fedloom.inputs import foreign
    from fedloom.runs.spec import with_overrides

    targets, assignments = _split(overrides or ())
    if len(targets) != 1:
        raise UsageError(f"a sweep is of one method, a spec or a folder, got {' '.join(targets) or 'none'}")
    ours = {"search": search, "baseline": baseline, "test": test, "metric": metric, "target": target, "seeds": seeds}
    folder = _folder(targets)
    if folder is not None:
        if assignments or over or setting or _set(ours):
            raise UsageError(f"{folder} has its settings; go on with it as it is, or sweep into another --out")
        given, out = _reopened(folder, out)
        comparison = Comparison.of(given)
    else:
        given = mapping(targets[0]) if targets[0].endswith(YAML) else {"method": targets[0]}
        given = with_overrides(given, assignments) | _set(ours) | _circumstances(setting)
        comparison = sweep_comparison(given | {"over": (given.get("over") or {}) | dict(map(_axis, over or ()))})
    if folder is not None:
        foreign(comparison.code, folder, trust)
    with _folder_for(out, "sweep", targets, comparison) as path:
        _carry_out(comparison, path, jobs, as_json, trust, chosen=True)


def commands(words: Sequence[str]) -> list[Callable[..., None]]:
    """Both commands, with the flags of run settings and of the fields of the methods that the words name."""
    if not {"compare", "sweep"} & set(words):
        return [compare, sweep]
    from fedloom.cli.flags import positionals, with_flags

    _, *targets = positionals(words)
    flags = _flags(_split(targets)[0])
    return [with_flags(compare, flags), with_flags(sweep, flags)]


def _flags(targets: Sequence[str]) -> list[Flag]:
    """Settings, and every field that one of the methods has."""
    from fedloom.cli.flags import entry, flags_of
    from fedloom.comparison.layout import SPEC
    from fedloom.comparison.reading import entry_from, mapping

    names: list[str] = []
    for target in targets:
        path = Path(target) / SPEC if _is_folder(target) else Path(target)
        if path.suffix not in YAML:
            names.append(entry_from(target)["name"])
        elif path.is_file():
            given = mapping(path)
            methods = given.get("methods") or [given.get("method") or "fedavg"]
            values = methods.values() if isinstance(methods, dict) else methods
            names += [entry_from(one)["name"] for one in values]
    found: dict[str, Flag] = {}
    for name in dict.fromkeys(names):
        for flag in flags_of(entry(name)):
            found.setdefault(flag.setting, flag)
    flags = found.values() or flags_of(None)
    return [flag for flag in flags if flag.setting not in OURS]


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is compared, and `name=value`: `fedprox:mu=0.1` is a method, `partition=dirichlet:0.1` a setting."""
    settings = [word for word in words if "=" in word.partition(":")[0]]
    return [word for word in words if word not in settings], settings


def _folder(targets: Sequence[str]) -> Path | None:
    """The folder to go on with, if that is what is asked for."""
    from fedloom.comparison.layout import SPEC

    if len(targets) != 1 or not _is_folder(targets[0]):
        return None
    if not (Path(targets[0]) / SPEC).is_file():
        raise UsageError(f"{targets[0]} is not a comparison's folder: it has no {SPEC}")
    return Path(targets[0])


def _is_folder(word: str) -> bool:
    """Whether it is a folder, and not a method that a folder is called after."""
    from fedloom.registry import METHODS

    return Path(word).is_dir() and word not in METHODS


def _reopened(folder: Path, out: Path | None) -> tuple[dict[str, Any], Path]:
    from fedloom.comparison.layout import SPEC
    from fedloom.comparison.reading import mapping

    return mapping(folder / SPEC), out or folder


def _set(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _circumstances(given: Sequence[str] | None) -> dict[str, Any]:
    """`--setting NAME:KEY=VALUE,..` as a comparison's `settings`."""
    from fedloom.parsing import Term

    found = {}
    for term in map(Term, given or ()):
        if term.values or not term.options:
            raise UsageError(f"--setting {term.text!r} is not of the form NAME:KEY=VALUE,KEY=VALUE")
        found[term.name] = term.options
    return {"settings": found} if found else {}


def _axis(text: str) -> tuple[str, list[Any]]:
    """`lr=0.01,0.1` as the name and the values."""
    from fedloom.fields import parse

    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise UsageError(f"--over {text!r} is not of the form NAME=VALUE,VALUE")
    found = parse(values if values.startswith("[") else f"[{values}]")
    return name, [parse(value) if isinstance(value, str) else value for value in found]


@contextlib.contextmanager
def _folder_for(out: Path | None, kind: str, targets: Sequence[str], comparison: Comparison) -> Iterator[Path]:
    """`out`, or a new folder, gone again if nothing was written: made at once, so that no other process takes it."""
    from fedloom.runs.writing import disk

    if out is not None:
        yield out
        return
    spec = len(targets) == 1 and targets[0].endswith(YAML)
    about = Path(targets[0]).stem if spec else next(iter(comparison.settings))
    while out is None:
        folder = output.vacant([about] if about.startswith(kind) else [kind, about])
        with disk(folder, "compare"), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            out = folder
    try:
        yield out
    finally:
        with contextlib.suppress(OSError):  # there is something in it
            out.rmdir()
            out.parent.rmdir()


def _carry_out(comparison: Comparison, out: Path, jobs: int, as_json: bool, trust: bool, chosen: bool = False) -> None:
    from fedloom.cli.board import Board
    from fedloom.comparison.run import execute
    from fedloom.report.comparison import write

    with _explained(out), Board(quiet=as_json) as board:
        results = execute(comparison, out, jobs=jobs, watcher=board, trust=trust)
        write(results)
    _tell(results, as_json, chosen)
    if results.failed:
        first = results.failed[0]
        raise RunError(
            f"{len(results.failed)} of {len(results.cells)} cells failed, as {first.name}: {first.error}; "
            f"to try them again: fedloom compare {shlex.quote(str(out))}"
        )


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """A stop says how far it came and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        from fedloom.comparison.layout import SPEC
        from fedloom.comparison.results import Results

        if (out / SPEC).is_file():
            cells = Results.read(out).cells
            done = sum(cell.run is not None for cell in cells)
            go_on = f"fedloom compare {shlex.quote(str(out))}"
            stop.args = (f"stopped with {done} of {len(cells)} cells done; go on with: {go_on}",)
        raise


def _tell(results: Results, as_json: bool, chosen: bool) -> None:
    from fedloom.cli.tables import console
    from fedloom.comparison.table import summary
    from fedloom.report.printed import print_table

    page = results.path / "report.html"
    found = {setting: results.chosen(setting) for setting in results.settings}
    best = {setting: one for setting, one in found.items() if one is not None}
    if as_json:
        output.tell_json(
            {
                "path": str(results.path),
                "report": str(page),
                "chosen_by_validation": {s: one[0] for s, one in best.items()},
            }
            | summary(results)
            | {"failed": {cell.name: cell.error for cell in results.failed}}
        )
        return
    out = console()
    print_table(out, results)
    for setting in results.settings if chosen else ():
        if setting in best:
            method, score, _ = best[setting]
            fields = ", ".join(f"{name}={value}" for name, value in results.tuned(setting, method).items())
            told = f" ({fields})" if fields else ""
            out.print(f"{setting}: validation chose {method}{told}, {score:.4f}", soft_wrap=True)
    if results.capped:
        names = ", ".join(dict.fromkeys(f"{cell.setting}/{cell.method}" for cell in results.capped))
        out.print(f"ended at the last round with some of the budget left: {names}", soft_wrap=True)
    out.print(str(page), soft_wrap=True)
