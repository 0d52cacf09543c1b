"""A method around another one."""

from dataclasses import dataclass

import pytest

import fedloom
from fedloom.errors import UsageError
from fedloom.method import Method, build
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.plugin import Plugin
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing import difference, trace


@dataclass(frozen=True)
class Around(Plugin):
    """Nothing of its own."""

    inner: Method = FedAvg()


def ran(method, engine="serial", **settings):
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 3, "engine": engine, **settings})
    made = Experiment(spec, Toy(), method).begin(None)
    made.go()
    return made


def plain(made):
    """What was run, with the calls of the inner method under its own names."""
    left = trace(made)
    for line in left["ledger"]:
        line["function"] = line["function"].removeprefix("inner.")
    return left


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool"])
@pytest.mark.parametrize("inner", [FedAvg(lr=0.1), Scaffold(epochs=2)])
def test_a_plugin_that_adds_nothing_is_the_inner_method(inner, engine):
    around = plain(ran(Around(inner), engine, workers=2 if engine == "pool" else 0))
    assert difference(around, plain(ran(inner))) is None


def test_the_inner_method_is_given_as_a_method_by_name_or_by_name_and_fields():
    assert Around().inner == FedAvg() and Around("scaffold").inner == Scaffold()
    assert Around({"name": "fedprox", "mu": 0.5}) == Around(FedProx(mu=0.5))
    assert Around(**Around(FedProx(mu=0.5)).fields()) == Around(FedProx(mu=0.5))
    for wrong in (3, {"mu": 1}, None):
        with pytest.raises(UsageError, match=r"inner is .* it must be a method"):
            Around(wrong)
    with pytest.raises(UsageError, match="did you mean 'scaffold'"):
        Around("scafold")


def test_declarations_are_the_inner_methods():
    assert Around(Scaffold()).compressible == Scaffold.compressible
    assert Around("local").global_model is False


def test_settings_reach_the_inner_methods_fields():
    spec = Spec.of({"method": {"name": "around"}})
    assert spec.method == {"name": "around"}
    from fedloom.runs.spec import with_overrides

    settings = with_overrides({"method": "around"}, ["method.inner=fedprox", "method.inner.mu=0.5"])
    assert settings["method"] == {"name": "around", "inner": {"name": "fedprox", "mu": 0.5}}
    with pytest.raises(UsageError, match="rounds has no fields"):
        with_overrides({"rounds": 3}, ["rounds.inner=4"])


def test_a_run_of_a_file_with_a_plugin_can_be_resumed(tmp_path):
    file = tmp_path / "shell.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from fedloom.method import Method\n"
        "from fedloom.methods.optimize.fedavg import FedAvg\n"
        "from fedloom.plugin import Plugin\n\n"
        "@dataclass(frozen=True)\nclass Shell(Plugin):\n    inner: Method = FedAvg()\n"
    )
    method = build(str(file), {"inner": {"name": "fedprox", "mu": 0.5}})
    settings = {"report": False, "data": "digits", "clients": 3}
    whole = fedloom.run(method, rounds=2, **settings)
    short = fedloom.run(method, rounds=1, out=tmp_path / "run", **settings)
    text = (short.path / "spec.yaml").read_text()
    (short.path / "spec.yaml").write_text(text.replace("rounds: 1", "rounds: 2"))
    again = fedloom.resume(short.path, report=False, trust=True)
    for one, other in zip(again.metrics, whole.metrics, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }


def test_what_the_inner_method_refuses_is_refused():
    with pytest.raises(UsageError, match="apfl does not go with dp=sample"):
        ran(Around(build("apfl")), dp="sample:noise=1")
