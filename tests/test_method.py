"""The registry, the fields of methods, and the files of users."""

import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

import fedloom
from fedloom.errors import UsageError
from fedloom.method import Method, Planned, build, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.ranges import LearningRate, Positive, Signed
from fedloom.registry import catalogue, entry_of
from fedloom.runs.outline import outline
from fedloom.runs.spec import Spec
from fedloom.sources import declared
from fedloom.tasks.toy import Toy

HEAVY = ["torch", "numpy", "pandas", "matplotlib", "sklearn", "pyarrow", "PIL", "msgpack"]
IDLE = [
    "import fedloom; fedloom.__version__; fedloom.__all__",
    "import fedloom.method",
    "from fedloom.registry import catalogue; [(e.name, e.question, e.fields()) for e in catalogue()]",
    "from fedloom.runs.spec import Spec; Spec.of({'method': 'fedavg', 'rounds': 3}).text('0')",
]


@pytest.mark.parametrize("code", IDLE)
def test_light_work_loads_nothing_heavy(code):
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print([m for m in {HEAVY} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert all(getattr(fedloom, name) is not None for name in fedloom.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'fedavg'"):
        fedloom.fedavg  # noqa: B018


def test_the_folder_is_the_registry():
    names = [entry.name for entry in catalogue()]
    assert names == sorted(set(names)) and "fedavg" in names and "__init__" not in names
    assert entry_of("fedavg").load(Method) is FedAvg and build("fedavg", {"lr": 0.5}) == FedAvg(lr=0.5)
    name, kind, default, comment = entry_of("fedavg").fields()[0]
    assert (name, kind, default) == ("lr", "float", "0.05") and comment.startswith("eta")


UNKNOWN = [
    (lambda: build("fedavgg"), "unknown method 'fedavgg'; did you mean 'fedavg'"),
    (lambda: build("quicksort"), "unknown method 'quicksort' (known: "),
    (lambda: build("fedavg", {"Lr": 0.1}), "unknown field of fedavg 'Lr'; did you mean 'lr'"),
    (lambda: build("nowhere.py"), "no method file"),
]


@pytest.mark.parametrize(("action", "complaint"), UNKNOWN)
def test_unknown_names_suggest_known_ones(action, complaint):
    with pytest.raises(UsageError) as refused:
        action()
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


@dataclass(frozen=True)
class Fields(Method):
    """A method with a field of every kind."""

    lr: LearningRate = 0.1
    epochs: Positive[int] = 1
    mu: float = 0.0
    shift: Signed[float] = 0.0
    layers: tuple[str, ...] = ()
    plain: bool = False
    limit: float | None = None


ACCEPTED = [
    ({"lr": 1}, ("lr", 1.0)),
    ({"mu": 0}, ("mu", 0.0)),
    ({"shift": -2}, ("shift", -2.0)),
    ({"layers": ["a", "b"]}, ("layers", ("a", "b"))),
    ({"limit": 3}, ("limit", 3.0)),
    ({"plain": True}, ("plain", True)),
]


@pytest.mark.parametrize(("fields", "expected"), ACCEPTED)
def test_fields_take_their_declared_type(fields, expected):
    method = Fields(**fields)
    value = getattr(method, expected[0])
    assert value == expected[1] and type(value) is type(expected[1])
    assert Fields(**method.fields()) == method


REFUSED = [
    ({"lr": 0.0}, "test_method.lr is 0.0; it must be greater than 0"),
    ({"lr": -1}, "lr is -1.0; it must be greater than 0"),
    ({"lr": "fast"}, "lr is 'fast', of type str; it must be of type float"),
    ({"lr": float("nan")}, "lr is nan; it must be a finite number"),
    ({"epochs": 0}, "epochs is 0; it must be greater than 0"),
    ({"epochs": 1.5}, "epochs is 1.5, of type float"),
    ({"epochs": True}, "epochs is True, of type bool"),
    ({"mu": -0.1}, "mu is -0.1; it must be at least 0"),
    ({"shift": float("-inf")}, "shift is -inf; it must be a finite number"),
    ({"limit": -1}, "limit is -1.0; it must be at least 0"),
    ({"plain": 1}, "plain is 1, of type int; it must be of type bool"),
]


@pytest.mark.parametrize(("fields", "complaint"), REFUSED)
def test_fields_out_of_range_are_refused(fields, complaint):
    with pytest.raises(UsageError) as refused:
        Fields(**fields)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_client_functions_in_the_order_of_the_text():
    class Child(Fields):
        @client
        def second(self, client): ...

        @client
        def first(self, client): ...

        def neither(self): ...

    assert list(Child.client_functions())[-2:] == ["second", "first"]
    assert "neither" not in Child.client_functions()
    assert list(FedAvg.client_functions()) == ["predict", "evaluate", "join", "judge_newcomer", "local"]


MINE = """
    from dataclasses import dataclass
    from fedloom.method import Method, client
    {imports}

    @dataclass(frozen=True)
    class Mine(Method):
        '''Does it work?'''
        lr: float = {lr}  # eta

        def round(self, server, cohort):
            up = cohort.mean(self.local, model=server.model)
            server.model = server.model + up.delta

        @client
        def local(self, client, model):
            return {{"delta": {delta}}}
"""


def users_file(folder, imports="", lr=0.1, delta="model * 0.5"):
    folder.mkdir(exist_ok=True)
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(MINE.format(imports=imports, lr=lr, delta=delta)))
    return path


def test_two_files_of_one_name_are_two_methods(tmp_path):
    one, other = (users_file(tmp_path / name, lr=lr) for name, lr in [("one", 0.1), ("other", 0.2)])
    built = [build(str(path)) for path in (one, other)]
    assert [method.lr for method in built] == [0.1, 0.2]
    assert built[0].name() == built[1].name() == "mine"
    assert type(built[0]) is not type(built[1]) and type(build(str(one))) is type(built[0])


def test_files_import_their_neighbours_and_not_one_anothers(tmp_path):
    for name, factor in [("one", 0.25), ("other", 4.0)]:
        path = users_file(tmp_path / name, imports="from .helper import FACTOR", delta="model * FACTOR")
        (path.parent / "helper.py").write_text(f"FACTOR = {factor}\n")
    for name, factor in [("one", 0.25), ("other", 4.0)]:
        run = fedloom.run(str(tmp_path / name / "mine.py"), Toy(), rounds=1)
        start = fedloom.run(str(users_file(tmp_path / "still", delta="model * 0.0")), Toy(), rounds=1).model
        assert ((run.model - (1 + factor) * start).norm() < 1e-5 * start.norm()).item()


def moved(path, **given):
    """How far a run of one round goes, in lengths of the initial model."""
    start = fedloom.run(str(users_file(path.parent / "still", delta="model * 0.0")), Toy(), rounds=1).model
    run = fedloom.run(str(path), Toy(), rounds=1, **given)
    return round(((run.model - start).norm() / start.norm()).item(), 3)


def test_an_edited_file_counts_in_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for factor in (0.5, 0.25, 0.5):  # texts of one length, written in the same second
        path = users_file(tmp_path, delta=f"model * {factor:.2f}")
        os.utime(path, (10**9, 10**9))
        assert moved(path) == factor


def test_an_edited_neighbour_counts_in_the_next_run(tmp_path):
    path = users_file(tmp_path, imports="from .helper import FACTOR", delta="model * FACTOR")
    for factor in (0.5, 0.125):
        (tmp_path / "helper.py").write_text(f"FACTOR = {factor}\n")
        assert moved(path) == factor


def test_an_edit_counts_in_comparisons_sweeps_and_resumption(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = users_file(tmp_path, lr=0.1)
    fedloom.run(str(path), Toy(), rounds=1, out="run", report=False)
    settings = {"seeds": 1, "rounds": 1, "report": False}
    runs = [
        lambda: fedloom.compare([str(path)], Toy(), **settings).cells[0].run,
        lambda: fedloom.sweep(str(path), Toy(), over={"rounds": [1]}, **settings).cells[0].run,
        lambda: fedloom.resume("run", Toy(), report=False, trust=True),
    ]
    for lr, run in enumerate(runs, start=2):
        users_file(tmp_path, lr=lr)
        with warnings.catch_warnings(action="ignore"):  # the resumption tells that the file is another one
            run()
        assert build(str(path)).lr == lr


def test_an_edit_within_a_run_waits_for_the_next(tmp_path):
    path = users_file(tmp_path, delta="model * 0.50")
    once = moved(path)

    def edit(row):
        users_file(tmp_path, delta="model * 0.25")
        assert type(build(str(path))) is kinds[0]

    kinds = [type(build(str(path)))]
    assert moved(path, on_round=edit) == once
    assert moved(path) == 0.25


def test_a_file_that_became_wrong_is_told_and_one_that_was_mended_runs(tmp_path):
    path = users_file(tmp_path)
    made = build(str(path))
    right = path.read_text()
    path.write_text(f"1 / 0\n{right}")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fedloom.run(str(path), Toy(), rounds=1)
    assert made.to_spec()["name"] == str(path)  # a Method of the former text still knows where it is from
    path.write_text(right)
    assert fedloom.run(str(path), Toy(), rounds=1).manifest["status"] == "finished"


@dataclass(frozen=True)
class HalfDone(Method):
    """Does half of the way do?"""

    lr: float = 0.05

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def local(self, client, model):
        return {"delta": 0.5 * model}


def test_a_class_of_a_notebook_is_called_by_its_own_name(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(HalfDone, "__module__", "__main__")
    assert HalfDone.name() == "half_done"
    run = fedloom.run(HalfDone, Toy(), rounds=1)
    assert outline(run)["method"] == "half_done"
    with pytest.raises(UsageError, match="half_done was written in a notebook, where no file gives it again; write it"):
        build(run.spec.method["name"])
    same = fedloom.compare([HalfDone, HalfDone(lr=0.1)], Toy(), seeds=1, rounds=1, report=False)
    assert same.methods == ("half_done:default", "half_done:lr=0.1")


def test_the_plan_of_a_class_without_a_file_is_read_from_its_functions(monkeypatch):
    planned = HalfDone().plan
    monkeypatch.setattr(HalfDone, "__module__", "nowhere")
    assert HalfDone().plan == planned == (Planned("train", "mean", "local"),)


def test_what_did_not_change_is_not_imported_again(tmp_path):
    for lr in (0.1, 0.2):
        path = users_file(tmp_path, lr=lr)
        fedloom.run(str(path), Toy(), rounds=1)
        kind = type(build(str(path)))
        fedloom.run(str(path), Toy(), rounds=1)
        assert type(build(str(path))) is kind


def test_a_users_file_runs_resumes_and_repeats_from_its_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what lies below the current folder is trusted
    path = users_file(tmp_path / "a folder")
    run = fedloom.run(str(path), Toy(), out=tmp_path / "run", report=False, rounds=1)
    assert run.spec.method == {"name": str(path), "lr": 0.1}
    assert fedloom.resume(tmp_path / "run", Toy(), report=False).manifest["status"] == "finished"


WITH_NETWORKS = '''
from dataclasses import dataclass

import torch
from torch import nn

import fedloom


class Scale(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([start]))


class Twice(Scale):
    pass


@dataclass(frozen=True)
class Scaled(fedloom.Method):
    """Does a network of a file's own reach every node?"""

    lr: float = 0.1

    def networks(self, site):
        return {"scale": site.network(Twice, 2.0)}

    def setup(self, server, clients):
        server.scale = server.nets["scale"]

    def round(self, server, cohort):
        up = cohort.mean(self.local, scale=server.scale)
        server.scale = server.scale + up.delta

    @fedloom.client
    def local(self, client, scale):
        w, _ = client.descend({"scale": scale}, self.lr, epochs=1, loss=lambda nets, batch: nets["scale"].factor.sum())
        return {"delta": w["scale"] - scale}
'''


def test_a_users_file_may_hold_networks_beside_its_method(tmp_path):
    path = tmp_path / "scaled.py"
    path.write_text(WITH_NETWORKS)
    entry = entry_of(str(path))
    assert entry.question == "Does a network of a file's own reach every node?"
    assert [name for name, *_ in entry.fields()] == ["lr"]
    run = fedloom.run(str(path), Toy(), out=tmp_path / "run", report=False, rounds=2, engine="pool", workers=2)
    assert run.manifest["status"] == "finished"


BROKEN = [
    ("x = 1\n", "expected exactly one class derived from Method, found 0"),
    ("from fedloom.method import Method\nclass A(Method): ...\nclass B(Method): ...\n", "found 2"),
    ("from torch import nn\nclass A(nn.Module): ...\n", "found 0"),
]


@pytest.mark.parametrize(("text", "complaint"), BROKEN)
def test_files_without_one_method(tmp_path, text, complaint):
    path = tmp_path / "odd.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        build(str(path))


def test_a_file_that_fails_says_so_every_time(tmp_path):
    path = tmp_path / "failing.py"
    path.write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            build(str(path))


def test_a_method_of_a_users_file_reaches_a_process_that_was_not_forked(tmp_path):
    from fedloom.engines.pool import Pool
    from fedloom.testing import Lab, difference, trace

    lab = Lab(build(str(users_file(tmp_path / "mine")), {"lr": 0.3}))
    assert difference(lab.serial, trace(lab.experiment(engine=Pool(1, start_method="spawn")))) is None


def test_a_comment_on_any_line_of_a_field_is_its_help():
    bare = {name for name, _, _, comment in declared_in(Spec) if not comment}
    assert bare == {"method", "rounds", "seed"}, "every other setting has its help"


def declared_in(cls):
    import ast
    import inspect

    source = inspect.getsource(sys.modules[cls.__module__])
    (found,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
    return declared(source, found)


def test_the_plan_reads_calls_from_the_text_of_all_boxes_helpers_bases_and_inner_methods():
    @dataclass(frozen=True)
    class Base(Method):
        def round(self, server, cohort):
            self.helper(cohort.where(lambda k: True))

        def helper(self, cohort):
            cohort.idle.submit(self.work)
            cohort.count(self.work)

        @client
        def work(self, client):
            return {}

    @dataclass(frozen=True)
    class Derived(Base):
        inner: Method = field(default_factory=FedAvg)

        def setup(self, server, clients):
            clients.mean(self.begin)

        def finish(self, server, clients):
            return [up for up in clients.where([1]).call(self.begin)]  # noqa: C416

        def unused(self, cohort):
            cohort.stream(self.begin)

        @client
        def begin(self, client):
            return {}

    assert {(call.kind, call.verb, call.function) for call in Derived().plan} == {
        ("setup", "mean", "begin"),
        ("train", "submit", "work"),
        ("finish", "call", "begin"),
        ("train", "mean", "inner.local"),
    }


# What a class declares


def made(**variables):
    return type("Mine", (Method,), {"__module__": "mine", "__annotations__": {}, **variables})


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"compresible": ("delta",)}, r"class variable of Mine 'compresible'; did you mean 'compressible'\?"),
        ({"temperature": 0.5}, r"a hyper-parameter has its type beside it, as in temperature: float = 0\.5"),
        ({"private": "delta"}, r"Mine\.private is 'delta'; it must be a tuple of names, as in \('delta',\)"),
        ({"compressible": ["delta"]}, r"Mine\.compressible is \['delta'\]; it must be a tuple of names"),
        ({"needs": (1,)}, r"Mine\.needs is \(1,\); it must be a tuple of names"),
        ({"refuses": ("secure",)}, r"Mine\.refuses is \('secure',\); it must be a dict"),
        ({"one_shot": 1}, r"Mine\.one_shot is 1; it must be a truth value"),
    ],
)
def test_a_class_variable_that_means_nothing_is_loud(variables, said):
    with pytest.raises(UsageError, match=said):
        made(**variables)


def test_a_class_may_have_variables_of_its_own():
    assert made(STEPS=3, _kept=1, private=("delta",), rough=True, helper=lambda self: 1).STEPS == 3

    @dataclass(frozen=True)
    class Own(Method):
        rule: ClassVar[str] = "first"
        lr: float = 0.1

    assert Own.rule == "first" and Own().fields() == {"lr": 0.1}
