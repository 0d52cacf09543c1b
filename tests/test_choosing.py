"""`pytest --method` and `--changed` run what concerns a method, and everything where something else was changed."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from choosing import ROOT, concerns, imports, own_tests, touched, with_dependents
from conftest import pytest_collection_modifyitems
from differing import changed, changed_in_branch

from fedloom.methods.optimize.fedprox import FedProx
from fedloom.registry import entry_of

IMPORTS = {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"_help"}, "_help": set(), "e": set()}
OWN = {"d": {"tests/methods/test_d.py"}, "e": {"tests/methods/test_d.py"}}


def test_the_files_of_methods_and_what_they_import():
    found = imports()
    assert found["fedvarp"] == {"fedstale"} and found["fedstale"] == {"_intervals"} and not found["fedavg"]
    assert {entry.stem for entry in (ROOT / "src/fedloom/methods").glob("*/*.py")} - {"__init__"} == found.keys()
    assert {"ccvr", "fcp", "oort"} <= with_dependents({"fedavg"}, found), "which wrap it or derive from it"
    assert with_dependents({"_intervals"}, found) == {"_intervals", "fedau", "fedstale", "fedvarp"}


def test_dependents_are_found_at_second_hand():
    assert with_dependents({"a"}, IMPORTS) == {"a", "b", "c"}
    assert with_dependents({"c"}, IMPORTS) == {"c"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["src/fedloom/methods/optimize/a.py", "tests/methods/test_b.py", "CHANGELOG.md"], {"a", "b"}),
        (["tests/mutants/methods/c.toml", "benchmarks/claims/a.yaml"], {"a", "c"}),
        (["src/fedloom/methods/optimize/_help.py"], {"_help"}),
        (["tests/methods/test_d.py"], {"d", "e"}),
        (["src/fedloom/methods/optimize/a.py", "src/fedloom/node.py"], None),
        (["src/fedloom/methods/optimize/__init__.py"], None),
        (["tests/methods/test_unknown.py"], None),
        (["tests/test_node.py"], None),
        (["pyproject.toml"], None),
        ([], set()),
    ],
)
def test_a_file_concerns_a_method_or_everything(files, expected):
    assert touched(files, IMPORTS, OWN) == expected


def test_a_test_concerns_the_methods_among_its_parameters_and_in_the_name_of_its_file():
    def item(file="tests/test_x.py", **params):
        return SimpleNamespace(path=ROOT / file, callspec=SimpleNamespace(params=params))

    prox = ("a line", FedProx(mu=0.0), 3)
    for one in (item(entry=entry_of("fedprox")), item(name="fedprox"), item(line=prox), item(cls=FedProx)):
        assert concerns(one, {"fedprox"}, {}) and not concerns(one, {"fedavg"}, {})
    assert not concerns(item(name="fedproxy", rounds=3), {"fedprox"}, {})
    assert not concerns(item(nested=[[prox]]), {"fedprox"}, {}), "nor is anything looked for at any depth"
    alone = SimpleNamespace(path=ROOT / "tests/methods/test_d.py")
    assert concerns(alone, {"e"}, OWN) and concerns(alone, {"d"}, {}) and not concerns(alone, {"a"}, OWN)


def test_every_method_has_tests_of_its_own():
    own = own_tests()
    assert all(own.get(name) for name in imports() if not name.startswith("_"))
    assert own["fedvarp"] == {"tests/methods/test_fedstale.py"}


def test_what_differs_from_where_the_branch_began(tmp_path: Path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True)

    def commit(name):
        (tmp_path / name).write_text(name)
        git("add", name)
        git("commit", "--quiet", "--message", name)

    git("init", "--quiet", "--initial-branch=main")
    commit("first")
    git("checkout", "--quiet", "-b", "mine")
    commit("mine")
    (tmp_path / "new").write_text("")
    git("checkout", "--quiet", "main")
    commit("theirs")
    git("checkout", "--quiet", "mine")
    assert changed_in_branch(tmp_path, "main") == {"mine", "new"}
    assert changed(tmp_path, "main") == {"mine", "new", "theirs"}
    with pytest.raises(ValueError, match=r"git merge-base nowhere HEAD: .*nowhere"):
        changed_in_branch(tmp_path, "nowhere")


@pytest.mark.parametrize(
    ("option", "complaint"), [("--method=fedavgg", "no method has this name"), ("--changed=nowhere", "nowhere")]
)
def test_options_that_name_nothing_are_refused(option, complaint):
    name, _, value = option.partition("=")
    given = {"--method": None, "--changed": None} | {name: [value] if name == "--method" else value}
    with pytest.raises(pytest.UsageError, match=complaint):
        pytest_collection_modifyitems(SimpleNamespace(getoption=given.get), [])
