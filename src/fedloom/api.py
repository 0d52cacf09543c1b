"""What a user calls: `run`, `resume`, `compare`, `sweep`. They carry out, then report; nothing below does both."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom import inputs
from fedloom.comparison.grid import Comparison
from fedloom.comparison.reading import mapping
from fedloom.comparison.results import Results
from fedloom.comparison.run import execute
from fedloom.comparison.scheduler import Watcher
from fedloom.comparison.sweep import sweep_comparison
from fedloom.errors import UsageError
from fedloom.method import Method
from fedloom.registry import entry_of
from fedloom.report import write as write_run
from fedloom.report.comparison import write as write_comparison
from fedloom.runs.experiment import Experiment, OnRound
from fedloom.runs.parts import named_as, with_article
from fedloom.runs.record import Run
from fedloom.runs.spec import KNOWN, Spec
from fedloom.task import Task


def run(
    method: str | Method = "fedavg",
    task: str | Task | None = None,
    *,
    out: str | Path | None = None,
    on_round: OnRound | None = None,
    report: bool = True,
    **settings: Any,
) -> Run:
    """Runs a federated experiment and returns its record.

    `method` is a name of the library, a file (`my_method.py`) or a Method with its fields; `task` a Task, or the data
    as on the command line, a path too. `settings` are those of `Spec`, and fields of the method (`lr=0.1`; where a
    field is called as a setting is, `fields={"rounds": 3}`). Columns that a run ignores unasked are told as a warning.
    With `out=None` the record is temporary and lives as long as the returned object; otherwise `out` becomes the run's
    folder and gets a report, unless `report=False`.

    Examples:
        >>> run = fedloom.run("fedprox", "digits", mu=0.1, clients=4, rounds=1)
        >>> 0 <= run.final["global_test_accuracy"] <= 1
        True
    """
    if isinstance(method, Method):
        settings["method"] = method.to_spec()
    else:
        fields = settings.pop("fields", {})
        known = {name for name, *_ in entry_of(method).fields()} - {*KNOWN}
        direct = {name: settings.pop(name) for name in known & settings.keys()}
        if twice := direct.keys() & fields.keys():
            raise UsageError(f"the field {min(twice)} of {method} is given twice, by itself and in fields; keep one")
        settings["method"] = {"name": method, **fields, **direct}
    _name_data(task, settings)
    spec = Spec.of(settings)
    Run.require_absent(out)  # told before the data are read
    given = task if isinstance(task, Task) else None
    made = Experiment(spec, given, method if isinstance(method, Method) else None).begin(out)
    columns = made.record.partition.get("columns", ())
    unused = [f"{c['name']} ({c['note']})" for c in columns if c["role"] == "ignored" and c["name"] not in spec.exclude]
    if unused and not any(c["role"] == "image" for c in columns):
        warnings.warn(f"{spec.data}: ignored is {', '.join(unused)}; exclude= says so, keep= uses it", stacklevel=2)
    with made.record.lock():
        record = made.go(on_round)
        if report and out is not None:
            write_run(record)
        return record


def resume(
    path: str | Path,
    task: Task | None = None,
    *,
    on_round: OnRound | None = None,
    report: bool = True,
    trust: bool = False,
) -> Run:
    """Goes on with a stopped or killed run from its last checkpoint: bitwise as if it had never stopped.

    A run whose task was given in Python needs that task again. One whose data changed since is refused. A method's file
    is executed if it lies in the current folder or below and is what the run began with; otherwise `trust` is needed.

    Examples:
        >>> import tempfile
        >>> def stop(row):
        ...     raise KeyboardInterrupt
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         _ = fedloom.run(rounds=2, clients=3, out=f"{folder}/run", on_round=stop, report=False)
        ...     except KeyboardInterrupt:
        ...         run = fedloom.resume(f"{folder}/run", report=False)
        ...     len(run.metrics)
        2
    """
    record = Run(path)
    with record.lock():
        changes = check_inputs(record, trust)
        for line in changes:
            warnings.warn(line, stacklevel=2)
        record = Experiment(record.spec, task).take_up(record, changes).go(on_round)
        if report:
            write_run(record)
        return record


def compare(
    methods: str | Method | Iterable[str | Method | Mapping[str, Any]] | Mapping[str, Any] | Path,
    task: str | Task | None = None,
    *,
    out: str | Path | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
    report: bool = True,
    trust: bool = False,
    **settings: Any,
) -> Results:
    """Runs every method at every seed under every setting, and returns what came out.

    `methods`: names, files, Methods, or mappings with fields (`{"name": "fedprox", "mu": 0.1, "label": "strong"}`); or
    the YAML file of a comparison. `task` as in `run`. `settings` are those of `Comparison` (`seeds=5`, `tune=20`,
    `fields={"lr": 0.1}` for all methods, `settings={"iid": {"partition": "iid"}, ...}`) and of `Spec`. With `out=None`
    the folder is temporary and lives as long as the returned object; in one that is there, finished cells are kept and
    the others are run, with `trust` also if a method's file changed since. `jobs`: runs at once (0: one a core). A task
    or a method that only Python has is run in this process. A cell that fails is told in the results; what cannot be
    carried out raises UsageError before it starts.

    Examples:
        >>> from fedloom.tasks.toy import Toy
        >>> results = fedloom.compare(["fedavg", {"name": "fedprox", "mu": 1}], Toy(), seeds=1, rounds=1, report=False)
        >>> [cell.method for cell in results.cells]
        ['fedavg', 'fedprox']
    """
    if isinstance(methods, Path) or (isinstance(methods, str) and methods.endswith((".yaml", ".yml"))):
        settings = mapping(methods) | settings
    else:
        settings["methods"] = methods
    _name_data(task, settings)
    given = None if isinstance(task, str) else task
    return _reported(execute(Comparison.of(settings), out, given, jobs, watcher, trust), report and out is not None)


def sweep(
    method: str | Mapping[str, Any] | Path,
    task: str | Task | None = None,
    *,
    over: Mapping[str, Sequence[Any]] | None = None,
    search: int = 0,
    out: str | Path | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
    report: bool = True,
    **settings: Any,
) -> Results:
    """Runs one method with other fields at every seed: all combinations of `over`, or what `search` trials find.

    `method` is a name, a file, a mapping with fields, or the YAML file of a run, in which `over` and `search` may stand
    too. `over` maps fields of the method and settings of a run to the values to take. A search goes over the ranges
    that the method declares, of fields that are not given, on validation data. The rest is as in `compare`.

    Examples:
        >>> from fedloom.tasks.toy import Toy
        >>> results = fedloom.sweep("fedavg", Toy(), over={"lr": [0.01, 0.1]}, seeds=1, rounds=1, report=False)
        >>> len(results.cells)
        2
    """
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith((".yaml", ".yml"))):
        settings = mapping(method) | settings
    else:
        settings = {"method": method} | settings
    settings |= {"over": over} if over else {}
    settings |= {"search": search} if search else {}
    _name_data(task, settings)
    given = None if isinstance(task, str) else task
    return _reported(execute(sweep_comparison(settings), out, given, jobs, watcher), report and out is not None)


def check_inputs(record: Run, trust: bool) -> list[str]:
    """What changed since a record was begun, to be said when it is resumed; raises UsageError if it must not be."""
    spec = record.spec
    anew = f"fedloom run {record.path / 'spec.yaml'} --out NEW_FOLDER"
    changes = inputs.checked([spec.method], record.manifest.get("inputs"), record.path, anew, trust)
    inputs.foreign([spec.method], record.path, trust)
    return changes


def _name_data(task: Any, settings: dict[str, Any]) -> None:
    """Writes into the settings what the data are: the name of data, a path, or a task that only Python has."""
    if isinstance(task, str | Path):
        settings["data"] = str(task)
    elif isinstance(task, Task):
        settings["data"] = named_as(task)
        settings.setdefault("partition", "given")
    elif task is not None:
        raise UsageError(
            f"the data are given as {with_article(type(task).__name__)}; expected a name (digits, hf:NAME), the path "
            "of a file or folder (a table can be saved: table.to_parquet('data.parquet')), or a fedloom.Task of your "
            "own"
        )


def _reported(results: Results, report: bool) -> Results:
    if report:
        write_comparison(results)
    return results
