"""What a user calls: `problem`, `run`, `rounds`, `resume`, `compare`, `sweep`. They carry out and report."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from fedloom import inputs, tasks
from fedloom.asked import Named, begun, name_data
from fedloom.comparison import results
from fedloom.comparison.grid import Comparison
from fedloom.comparison.layout import SPEC
from fedloom.comparison.reading import mapping
from fedloom.comparison.run import execute
from fedloom.comparison.scheduler import Watcher
from fedloom.comparison.sweep import sweep_comparison
from fedloom.data.given import Given
from fedloom.errors import UsageError
from fedloom.letters import with_article
from fedloom.method import Method
from fedloom.progress import shown, watching
from fedloom.report import write as write_run
from fedloom.report.comparison import write as write_comparison
from fedloom.report.results import Results
from fedloom.runs.experiment import Experiment, OnRound
from fedloom.runs.fitted import TASKS_OWN
from fedloom.runs.outline import folders
from fedloom.runs.record import Run
from fedloom.runs.spec import KNOWN, Spec
from fedloom.task import Task
from fedloom.user_files import reread
from fedloom.user_networks import named_network

if TYPE_CHECKING:
    from fedloom.settings import ComparisonSettings, RunSettings


def run(
    method: Named = "fedavg",
    task: Task | Any = None,
    *,
    fields: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    on_round: OnRound | None = None,
    report: bool = True,
    progress: bool | None = None,
    **settings: Unpack[RunSettings],
) -> Run:
    """Runs a federated experiment and returns its record.

    `method` is a name of the library, with fields if need be (`"fedprox:mu=0.1"`), a file (`my_method.py`), a class
    (`fedloom.FedProx`) or a Method with its fields; `task` a Task, or the data (also `data=`): by name or path as on
    the command line, or as Python has them (see `problem`). `settings` are those of `Spec`, and fields of the method
    (`lr=0.1`; where a field is called as a setting is, `fields={"rounds": 3}`). Columns that a run ignores unasked are
    told as a warning. With `out=None` the record is temporary and lives as long as the returned object; otherwise `out`
    becomes the run's folder and gets a report, unless `report=False`. In a notebook a bar shows how far it is; with
    `progress=True` one does in a terminal too, with `progress=False` nowhere. The logger `fedloom` hears of every
    round (INFO), and of all its numbers (DEBUG).

    `on_round` is called with each round's row when the round is over. It may answer "stop": the run then ends with this
    round as with its last one, and `manifest["stopped_because"]` says so. Any error that it raises ends the run as
    failed, KeyboardInterrupt as stopped.

    Examples:
        >>> run = fedloom.run("fedprox", "digits", mu=0.1, clients=4, rounds=1)
        >>> 0 <= run.final["global_test_accuracy"] <= 1
        True
        >>> same = fedloom.run(fedloom.FedProx(mu=0.1), "digits", clients=4, rounds=1)
        >>> same.final["global_test_accuracy"] == run.final["global_test_accuracy"]
        True
    """
    made = begun(method, task, fields, out, settings)
    with made.record.lock():
        with shown(made, progress) as show:
            for row in made.rounds(on_round):
                show(row)
        if report and out is not None:
            write_run(made.record)
        return made.record


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
    given = name_data(data, settings)
    return tasks.build(Spec.of(settings), given if isinstance(given, Given) else None)


class Rounds(Iterator[dict[str, Any]]):
    """The rounds of a run as they end, each by its row. `run` is its record, before the first round too."""

    def __init__(self, made: Experiment, on_round: OnRound | None, report: bool) -> None:
        self.run = made.record
        self._rows = _rows(made, on_round, report)
        # An iterator that is dropped stops its run while there is still an interpreter to do it.
        self.close = weakref.finalize(self, _closed, self._rows, made)

    def __next__(self) -> dict[str, Any]:
        return next(self._rows)

    def __enter__(self) -> Rounds:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def rounds(
    method: Named = "fedavg",
    task: Task | Any = None,
    *,
    fields: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    on_round: OnRound | None = None,
    report: bool = True,
    **settings: Unpack[RunSettings],
) -> Rounds:
    """The rounds of a run, one at a time: each step of the loop trains one and gives its row of `metrics`.

    Parameters are those of `run`. What is wrong in them is told at once. The loop may be left at any time: the run is
    then stopped, and `resume` goes on with it where it has a folder (`out`). `rounds(...).run` is the record.

    Examples:
        >>> rounds = fedloom.rounds("fedprox", "digits", mu=0.1, clients=4, rounds=20)
        >>> for row in rounds:
        ...     if row["global_test_accuracy"] > 0.2:
        ...         break
        >>> len(rounds.run.metrics) == row["round"] < 20
        True
    """
    made = begun(method, task, fields, out, settings)
    return Rounds(made, on_round, report and out is not None)


def resume(
    path: str | Path,
    task: Task | Any = None,
    *,
    rounds: int | None = None,
    on_round: OnRound | None = None,
    report: bool = True,
    progress: bool | None = None,
    trust: bool = False,
    model: Any = None,
) -> Run:
    """Goes on with a stopped or killed run from its last checkpoint: bitwise as if it had never stopped.

    With `rounds` a run goes on to more rounds than it was to have, bitwise as if it had been asked for them from the
    start; where a method or a schedule goes by their number, that is refused.

    A run whose task, data or network (`model`) were given in Python needs these again, where no file gives the network.
    One whose data changed since is refused. A
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
    reread()
    record = Run(path)
    with record.lock():
        changes = check_inputs(record, trust)
        for line in changes:
            warnings.warn(line, stacklevel=2)
        if model is not None and named_network(model) != record.spec.model:
            raise UsageError(
                f"{path} was begun with model={record.spec.model}, and this is {named_network(model)}; give the same "
                "network, of a module with the weights that it had then"
            )
        given = task if task is None or isinstance(task, Task) else Given.of(task)
        made = taken_up(record, given, rounds, changes)
        with shown(made, progress) as show:
            for row in made.rounds(on_round):
                show(row)
        record = made.record
        if report:
            write_run(record)
        return record


def compare(
    methods: Named | Iterable[str | Method | type[Method] | Mapping[str, Any]] | Mapping[str, Any],
    task: Task | Any = None,
    *,
    out: str | Path | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
    report: bool = True,
    progress: bool | None = None,
    trust: bool = False,
    **settings: Unpack[ComparisonSettings],
) -> Results:
    """Runs every method at every seed under every setting, and returns what came out.

    `methods`: names, files, Methods, or mappings with fields (`{"name": "fedprox", "mu": 0.1, "label": "strong"}`); or
    the YAML file of a comparison. `task` as in `run`. `settings` are those of `Comparison` (`seeds=5`, `tune=20`,
    `fields={"lr": 0.1}` for all methods, `settings={"iid": {"partition": "iid"}, ...}`) and of `Spec`. With `out=None`
    the folder is temporary and lives as long as the returned object; in one that is there, finished cells are kept and
    the others are run, with `trust` also if a method's file changed since. `jobs`: runs at once (0: one a core). A task
    or a method that only Python has is run in this process. A cell that fails is told in the results; what cannot be
    carried out raises UsageError before it starts. `progress` as in `run`; a `watcher` is told of every run.

    Examples:
        >>> from fedloom.tasks.toy import Toy
        >>> results = fedloom.compare(["fedavg", {"name": "fedprox", "mu": 1}], Toy(), seeds=1, rounds=1, report=False)
        >>> [cell.method for cell in results.cells]
        ['fedavg', 'fedprox']
    """
    reread()
    if isinstance(methods, Path) or (isinstance(methods, str) and methods.endswith((".yaml", ".yml"))):
        given = mapping(methods) | {**settings}
    else:
        given = {**settings, "methods": methods}
    own = name_data(task, given)
    with watching(watcher, progress) as watches:
        found = execute(Comparison.of(given), out, own, jobs, watches, trust)
    return _reported(found, report and out is not None)


def sweep(
    method: Named | Mapping[str, Any],
    task: Task | Any = None,
    *,
    over: Mapping[str, Sequence[Any]] | None = None,
    search: int = 0,
    out: str | Path | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
    report: bool = True,
    progress: bool | None = None,
    **settings: Unpack[ComparisonSettings],
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
    reread()
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith((".yaml", ".yml"))):
        given = mapping(method) | {**settings}
    else:
        given = {"method": method} | {**settings}
    given |= {"over": over} if over else {}
    given |= {"search": search} if search else {}
    own = name_data(task, given)
    with watching(watcher, progress) as watches:
        found = execute(sweep_comparison(given), out, own, jobs, watches)
    return _reported(found, report and out is not None)


def find_runs(folder: str | Path = "runs") -> list[Run]:
    """The runs in a folder and below, those of comparisons included, by name. `run.frame()` is the table of one.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for seed in (0, 1):
        ...         _ = fedloom.run(rounds=1, clients=3, seed=seed, out=f"{folder}/seed-{seed}", report=False)
        ...     [run.spec.seed for run in fedloom.find_runs(folder)]
        [0, 1]
    """
    return [Run(path) for path in folders(folder)]


def load(path: str | Path) -> Run | Results:
    """What lies in a folder: the record of a run, or the results of a comparison.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fedloom.run(rounds=1, clients=3, out=f"{folder}/run", report=False)
        ...     type(fedloom.load(f"{folder}/run")).__name__
        'Run'
    """
    return Results.shown(results.Results.read(Path(path))) if (Path(path) / SPEC).is_file() else Run(path)


def taken_up(
    record: Run, task: Task | Given | None = None, rounds: int | None = None, told: Sequence[str] = ()
) -> Experiment:
    """A record's experiment, to go on with: to so many rounds in all, if they are given."""
    spec = record.spec if rounds is None else dataclasses.replace(record.spec, rounds=rounds)
    made = Experiment(spec, task)
    if rounds not in (None, made.spec.rounds):
        raise UsageError(f"{made.method.name()} trains in one round, however many are asked for; leave rounds out")
    return made.take_up(record, told)


def check_inputs(record: Run, trust: bool) -> list[str]:
    """What changed since a record was begun, to be said when it is resumed; raises UsageError if it must not be."""
    spec = record.spec
    anew = f"fedloom run {record.path / 'spec.yaml'} --out NEW_FOLDER"
    changes = inputs.checked(spec.code, record.manifest.get("inputs"), record.path, anew, trust)
    inputs.foreign(spec.code, record.path, trust)
    return changes


def _rows(made: Experiment, on_round: OnRound | None, report: bool) -> Generator[dict[str, Any], None, None]:
    with made.record.lock():
        yield from made.rounds(on_round)
        if report:
            write_run(made.record)


def _closed(rows: Generator[dict[str, Any], None, None], made: Experiment) -> None:
    """Stops a run whose rounds nobody asks for any more, if it is not over."""
    rows.close()
    if made.manifest["status"] == "running":  # not even the first was asked for
        made.write_manifest("stopped")


def _reported(found: results.Results, report: bool) -> Results:
    if report:
        write_comparison(found)
    return Results.shown(found)
