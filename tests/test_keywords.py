"""A run is asked for by keywords, by one word, by a class, by an object, on the command line: always the same run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.registry import catalogue
from fedloom.runs.spec import KNOWN
from fedloom.tasks.toy import Toy

TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE / "docs"))
import hints  # noqa: E402

SMALL = {"clients": 3, "rounds": 2, "report": False}
STRONG = '''
from dataclasses import dataclass
from fedloom.methods.optimize.fedprox import FedProx

@dataclass(frozen=True)
class Strong(FedProx):
    """Does a strong pull help?"""

    mu: float = 0.7
'''


def bits(run):
    return run.model.flat.numpy().tobytes()


def asked(*args, **kwargs):
    return fedloom.run(*args, **SMALL, **kwargs)


def test_every_way_to_give_fields_is_the_same_run_bit_by_bit(tmp_path):
    weak = asked("fedprox")
    found = {
        "keywords": asked("fedprox", "digits", mu=0.7, lr=0.07),
        "fields": asked("fedprox", "digits", fields={"mu": 0.7, "lr": 0.07}),
        "both": asked("fedprox", "digits", fields={"mu": 0.7}, lr=0.07),
        "word": asked("fedprox:mu=0.7,lr=0.07", "digits"),
        "word and keyword": asked("fedprox:mu=0.7", "digits", lr=0.07),
        "object": asked(fedloom.FedProx(mu=0.7, lr=0.07), "digits"),
        "class": asked(fedloom.FedProx, "digits", mu=0.7, lr=0.07),
        "class and fields": asked(fedloom.FedProx, "digits", fields={"mu": 0.7}, lr=0.07),
    }
    out = tmp_path / "run"
    assert main(["run", "fedprox:mu=0.7", "--lr", "0.07", "--clients", "3", "rounds=2", "--out", str(out)]) == 0
    found["command line"] = fedloom.Run(out)
    spec = tmp_path / "spec.yaml"
    spec.write_text("method: fedprox:mu=0.7\nclients: 3\nrounds: 2\n")
    assert main(["run", str(spec), "method.lr=0.07", "--out", str(tmp_path / "other")]) == 0
    found["YAML"] = fedloom.Run(tmp_path / "other")
    assert {name: bits(run) == bits(found["fields"]) for name, run in found.items()} == dict.fromkeys(found, True)
    assert {name: run.spec.method for name, run in found.items()} == dict.fromkeys(found, found["fields"].spec.method)
    assert bits(weak) != bits(found["fields"])


def test_a_file_takes_fields_in_the_same_word(tmp_path):
    file = tmp_path / "strong.py"
    file.write_text(STRONG)
    alone, given = asked(str(file)), asked(f"{file}:mu=0.2")
    assert alone.spec.method["mu"] == 0.7 and given.spec.method["mu"] == 0.2
    assert asked(file).spec.method == alone.spec.method  # a Path
    assert bits(given) == bits(asked("fedprox", mu=0.2))
    odd = tmp_path / "a:b" / "strong.py"  # a colon of a folder begins no fields
    odd.parent.mkdir()
    odd.write_text(STRONG)
    assert bits(asked(str(odd))) == bits(alone)


def test_a_method_inside_another_is_given_in_a_word_or_as_a_class():
    given = ["fedprox:mu=0.7", {"name": "fedprox", "mu": 0.7}, fedloom.FedProx(mu=0.7), fedloom.FedProx]
    word, mapping, instance, plain = (asked("feddisco", inner=one) for one in given)
    assert bits(word) == bits(mapping) == bits(instance) != bits(plain)
    assert bits(plain) == bits(asked(fedloom.FedDisco(inner=fedloom.FedProx)))


def test_compare_and_sweep_take_classes_and_words():
    methods = [fedloom.FedAvg, fedloom.FedProx(mu=1), "fedprox:mu=0.5", fedloom.FedProx]
    results = fedloom.compare(methods, Toy(), seeds=1, rounds=1, report=False)
    assert results.methods == ("fedavg", "fedprox:mu=1.0", "fedprox:mu=0.5", "fedprox:default")
    alone = fedloom.compare(fedloom.FedProx, Toy(), seeds=1, rounds=1, report=False)
    assert alone.methods == ("fedprox",)
    swept = fedloom.sweep(fedloom.FedProx, Toy(), over={"mu": [0.1, 1]}, seeds=1, rounds=1, report=False)
    assert swept.methods == ("mu=0.1", "mu=1")
    worded = fedloom.sweep("fedprox:mu=1", Toy(), over={"lr": [0.1]}, seeds=1, rounds=1, report=False)
    assert worded.cells[0].run.spec.method["mu"] == 1


TWICE = "the field mu of fedprox is given twice"
WRONG = {
    "keyword and fields": (("fedprox",), {"mu": 1, "fields": {"mu": 1}}, TWICE),
    "keyword and word": (("fedprox:mu=1",), {"mu": 1}, TWICE),
    "word and fields": (("fedprox:mu=1",), {"fields": {"mu": 1}}, TWICE),
    "class, keyword and fields": ((None,), {"mu": 1, "fields": {"mu": 1}}, TWICE),
    "a value without a name": (("fedprox:0.1",), {}, "'fedprox:0.1': 0.1 is not of the form field=value"),
    "a name in the word": (("fedprox:name=fedavg",), {}, "gives a name twice"),
    "a slip in a field": (("fedprox",), {"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'"),
    "what the fields are": (("fedprox",), {"muu": 3}, "; fields of fedprox are batch, epochs, lr, mu"),
    "a slip in a setting": (("fedavg",), {"round": 3}, "unknown setting 'round'; did you mean 'rounds'"),
    "a slip in the word": (("fedprox:epoch=3",), {}, "unknown field of fedprox 'epoch'; did you mean 'epochs'"),
    "a slip in a class's fields": ((None,), {"fields": {"epoch": 3}}, "unknown field of fedprox 'epoch'"),
    "a field beside an object": (("object",), {"mu": 1}, r"given where FedProx\(...\) is made"),
    "fields beside an object": (("object",), {"fields": {"mu": 1}}, "give mu=... where it is made"),
    "a slip in a name": (("fedporx:mu=1",), {}, "unknown method 'fedporx'; did you mean 'fedprox'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_said(case):
    (method,), settings, told = WRONG[case]
    method = {"object": fedloom.FedProx(), None: fedloom.FedProx}.get(method, method)
    with pytest.raises(UsageError, match=told):
        fedloom.run(method, Toy(), **settings)


def test_a_field_in_a_word_and_by_a_flag_is_refused(capsys):
    assert main(["run", "fedprox:mu=1", "--mu", "2"]) == 2
    assert "the field mu of fedprox is given twice" in capsys.readouterr().err


def test_help_lists_the_fields_of_a_method_in_a_word(capsys):
    assert main(["run", "fedprox:mu=1", "--help"]) == 0
    assert "--stragglers" in capsys.readouterr().out


def test_every_method_is_a_class_of_the_package():
    classes = {getattr(fedloom, one) for one in dir(fedloom) if isinstance(getattr(fedloom, one), type)}
    methods = {one for one in classes if issubclass(one, fedloom.Method)} - {fedloom.Method}
    assert sorted(one.name() for one in methods) == [entry.name for entry in catalogue()]
    assert fedloom.FedProx is type(fedloom.FedProx()) and fedloom.FedProx.name() == "fedprox"
    assert "FedProx" not in fedloom.__all__  # `from fedloom import *` does not import them all


@pytest.mark.parametrize(
    ("name", "near"),
    [("FedPorx", "FedProx"), ("fedprox", "FedProx"), ("runn", "run"), ("Scafold", "Scaffold"), ("sweeep", "sweep")],
)
def test_a_slip_in_a_name_of_the_package_names_the_near_one(name, near):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; did you mean '{near}'"):
        getattr(fedloom, name)


def test_the_package_and_its_names_come_without_torch():
    code = (
        "import sys, time; began = time.process_time(); import fedloom; took = time.process_time() - began;"
        "dir(fedloom); from fedloom import errors; print(took < 0.1, 'torch' in sys.modules, 'yaml' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["True", "False"]


@pytest.mark.parametrize("path", hints.PAGES, ids=lambda path: path.stem)
def test_what_editors_read_is_up_to_date(path):
    assert path.read_text() == hints.PAGES[path](), "run: python docs/hints.py"


def test_what_editors_read_has_every_setting_and_every_name():
    assert hints.named_in(hints.SOURCE / "__init__.pyi") == {*fedloom.__all__} | {
        one for one in dir(fedloom) if isinstance(getattr(fedloom, one), type) and one not in fedloom.__all__
    }
    tree = ast.parse((hints.SOURCE / "settings.pyi").read_text())
    typed = {
        one.name: {line.target.id for line in one.body if isinstance(line, ast.AnnAssign)}
        for one in tree.body
        if isinstance(one, ast.ClassDef)
    }
    assert typed["Settings"] == {*KNOWN} - {"method"}
    assert {"mu", "lr", "buffer"} < typed["Fields"] and not typed["Fields"] & {*KNOWN}


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({"float", "int"}, "float | int"),
        ({"float | None", "float"}, "float | None"),
        ({"tuple[Signed[float], ...]"}, "Sequence[float]"),
        ({"tuple[str, ...]"}, "Sequence[str] | str"),
        ({"Literal['a', 'b']", "int"}, 'int | Literal["a", "b"]'),
    ],
)
def test_types_of_several_methods_are_one(kinds, said):
    assert set(hints.union(kinds).split(" | ")) == set(said.split(" | "))
