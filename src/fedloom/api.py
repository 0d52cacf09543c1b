"""What a user calls: `problem`, `run`, `resume`, `compare`, `sweep`. They carry out and report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom import inputs, tasks
from fedloom.comparison.grid import Comparison
from fedloom.comparison.reading import mapping
from fedloom.comparison.results import Results
from fedloom.comparison.run import execute
from fedloom.comparison.scheduler import Watcher
from fedloom.comparison.sweep import sweep_comparison
from fedloom.data.given import Given
from fedloom.errors import UsageError
from fedloom.letters import with_article
from fedloom.method import Method
from fedloom.registry import entry_of
from fedloom.report import write as write_run
from fedloom.report.comparison import write as write_comparison
from fedloom.runs.experiment import Experiment, OnRound
from fedloom.runs.parts import TASKS_OWN, named_as
from fedloom.runs.record import Run
from fedloom.runs.spec import KNOWN, Spec
from fedloom.task import Task


def run(
    method: str | Method = "fedavg",
    task: Task | Any = None,
    *,
    out: str | Path | None = None,
    on_round: OnRound | None = None,
    report: bool = True,
    **settings: Any,
) -> Run:
    """Runs a federated experiment and returns its record.

    `method` is a name of the library, a file (`my_method.py`) or a Method with its fields; `task` a Task, or the data
    (also `data=`): by name or path as on the command line, or as Python has them (see `problem`). `settings` are those
    of `Spec`, and fields of the method (`lr=0.1`; where a field is called as a setting is, `fields={"rounds": 3}`).
    Columns that a run ignores unasked are told as a warning.
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
    given = _name_data(task, settings)
    spec = Spec.of(settings)
    Run.require_absent(out)  # told before the data are read
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


def problem(data: Any, problem: str = "classification", **settings: Any) -> Task:
    """A Task made of data: what `run` learns, to be looked at, changed or given to several runs.

    `data` are a name or a path as on the command line, or what Python has:

    - a table: a DataFrame of pandas (or of another library that speaks Arrow), a Dataset of the `datasets` library;
    - inputs and labels: `(x, y)`, arrays or tensors [N, ...] and [N], or a DataFrame and a Series;
    - a mapping of columns by name, arrays [N, ...] each;
    - a Dataset of PyTorch, whose items are `(x, y)` or dicts, each asked for once;
    - a pair `(train, test)` of these, or a mapping `{"train": ..., "test": ...}`; without a test split one is held out;
    - a list of these, one for each client, or a mapping by the clients' names: then the partition is theirs.

    `settings` are those of `Spec` that say what is learned (`label`, `partition`, `clients`, `model`, `seed`, ...).
    Raises UsageError for what cannot be taken for data, and for settings of a run.

    Examples:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 3))
        >>> task = fedloom.problem((x, x[:, 0] > 0), partition="iid", clients=4)
        >>> task.population, task.shape, len(task.global_test())
        (4, (3,), 40)
        >>> fedloom.problem([(x[:90], x[:90, 0] > 0), (x[90:], x[90:, 0] > 0)]).population
        2
    """
    if strange := next((name for name in settings if name in KNOWN and name not in (*TASKS_OWN, "seed")), None):
        raise UsageError(f"{strange} is a setting of a run and not of its problem; give it to fedloom.run")
    if isinstance(data, Task):
        raise UsageError(f"{with_article(type(data).__name__)} is a problem already; give it to fedloom.run as it is")
    settings = settings | {"problem": problem}
    given = _name_data(data, settings)
    return tasks.build(Spec.of(settings), given if isinstance(given, Given) else None)


def resume(
    path: str | Path,
    task: Task | Any = None,
    *,
    on_round: OnRound | None = None,
    report: bool = True,
    trust: bool = False,
) -> Run:
    """Goes on with a stopped or killed run from its last checkpoint: bitwise as if it had never stopped.

    A run whose task or data were given in Python needs these again. One whose data changed since is refused. A
    method's file is executed if it lies in the current folder or below and is what the run began with; otherwise
    `trust` is needed.

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
        given = None if task is None else task if isinstance(task, Task) else Given.of(task)
        record = Experiment(record.spec, given).take_up(record, changes).go(on_round)
        if report:
            write_run(record)
        return record


def compare(
    methods: str | Method | Iterable[str | Method | Mapping[str, Any]] | Mapping[str, Any] | Path,
    task: Task | Any = None,
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
    given = _name_data(task, settings)
    return _reported(execute(Comparison.of(settings), out, given, jobs, watcher, trust), report and out is not None)


def sweep(
    method: str | Mapping[str, Any] | Path,
    task: Task | Any = None,
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
    given = _name_data(task, settings)
    return _reported(execute(sweep_comparison(settings), out, given, jobs, watcher), report and out is not None)


def check_inputs(record: Run, trust: bool) -> list[str]:
    """What changed since a record was begun, to be said when it is resumed; raises UsageError if it must not be."""
    spec = record.spec
    anew = f"fedloom run {record.path / 'spec.yaml'} --out NEW_FOLDER"
    changes = inputs.checked(spec.code, record.manifest.get("inputs"), record.path, anew, trust)
    inputs.foreign(spec.code, record.path, trust)
    return changes


def _name_data(task: Any, settings: dict[str, Any]) -> Task | Given | None:
    """Writes into the settings what the data are; returns what only Python has of them, a task or data."""
    if task is None:
        task = settings.pop("data", None)
    elif settings.get("data") is not None:
        raise UsageError(f"the data are given twice, as {with_article(type(task).__name__)} and as data=; keep one")
    if task is None:
        return None
    if isinstance(task, str | os.PathLike):
        settings["data"] = os.fspath(task)
        return None
    if isinstance(task, Task):
        settings["data"] = named_as(task)
        settings.setdefault("partition", "given")
        return task
    given = Given.of(task)
    settings["data"] = str(given)
    if given.client is not None:
        settings.setdefault("partition", f"column:{given.client}")
    return given


def _reported(results: Results, report: bool) -> Results:
    if report:
        write_comparison(results)
    return results
