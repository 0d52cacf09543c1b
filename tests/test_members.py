"""What installed packages add: the package of the page on extension packages, and some that are not sound."""

import copy
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedloom
from fedloom import members, registry
from fedloom.aggregators import RULES
from fedloom.boundary.attack import ATTACKS
from fedloom.boundary.compress import STAGES
from fedloom.cli import main
from fedloom.data import federate, load
from fedloom.data.rules import PARTITIONS
from fedloom.encoders import ENCODERS
from fedloom.engines import ENGINES
from fedloom.engines.pool import Pool
from fedloom.errors import UsageError
from fedloom.method import Method, build
from fedloom.nets import BUILDERS
from fedloom.optimizers import OPTIMIZERS
from fedloom.registry import METHODS, added_name, entries, entry_of, known_as
from fedloom.schedules import SCHEDULES
from fedloom.tasks import KINDS
from fedloom.testing import check_method
from fedloom.testing.lab import Lab, alike, trace
from fedloom.tracking import TRACKERS

SOURCE = str(Path(fedloom.__file__).parents[1])
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
ADDED = {
    "damped": METHODS,
    "first_rows": RULES,
    "shrink": ATTACKS,
    "stripes": PARTITIONS,
    "scaled": KINDS,
    "ternary": STAGES,
}
SETTINGS = {
    "data": "digits",
    "clients": 6,
    "partition": "stripes:2",
    "problem": "scaled:0.5",
    "attack": "shrink:2,factor=0.01",
    "aggregate": "first_rows:3",
    "compress": "ternary:0.3",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package's files and its entry points, by group, where installed packages lie."""
    site = tmp_path / "site"
    site.mkdir()

    def forget():
        members.offered.cache_clear()
        members.packages.cache_clear()
        members._refuse.cache_clear()
        registry._ADDED.clear()

    def put(name, points, files, version="1.2"):
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        about = site / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        sections = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in its.items()) for group, its in points.items()]
        (about / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), SOURCE]))
        forget()
        return site

    before = set(sys.modules)
    yield put
    for name in set(sys.modules) - before:
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    forget()


@pytest.fixture
def extras(install):
    """The package of the page."""
    (about,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    project = tomllib.loads(about)["project"]
    files = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)) | {"loom_extras/__init__.py": ""}
    return install(project["name"], project["entry-points"], files, project["version"])


def other(script):
    """What a script prints in another process, in which the package is installed too."""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def metrics(run):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in run.metrics]


def test_the_page_has_a_member_of_every_kind_that_it_lists(extras):
    assert set(re.findall(r"\| `(fedloom\.\w+)` \|", PAGE)) == {
        registry.group for registry in (*ADDED.values(), BUILDERS, ENCODERS, ENGINES, OPTIMIZERS, SCHEDULES, TRACKERS)
    }


def test_members_are_listed_and_no_code_is_imported(extras, capsys):
    for name, registry_ in ADDED.items():
        assert name in registry_ and name in list(registry_) and len(registry_) == len(registry_.own) + 1
        assert name not in registry_.own
    assert main(["methods", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed["damped"]["group"] == "loom-extras 1.2"
    assert listed["damped"]["question"] == "Does it help to go only a part of the way to the clients' mean?"
    assert [field["name"] for field in listed["damped"]["fields"]] == ["lr", "damping"]
    assert main(["methods", "half the way"]) == 2 and main(["methods", "part of the way"]) == 0
    assert "damped" in capsys.readouterr().out
    assert not [name for name in sys.modules if name.startswith("loom_extras")]
    said = other("import sys; from fedloom.cli import main; main(['methods']); print('torch' in sys.modules)")
    assert re.search(r"damped\s+loom-extras 1\.2\s+Does it help", said) and said.rstrip().endswith("False")


@pytest.mark.parametrize("name", ADDED)
def test_a_name_that_is_near_is_told(extras, name):
    slip = name[:-2] + name[-1]
    with pytest.raises(UsageError, match=f"unknown {ADDED[name].kind} '{slip}'; did you mean '{name}'"):
        ADDED[name][slip]


def test_options_are_bound_by_the_fields(extras):
    with pytest.raises(UsageError, match=r"unknown option of first_rows 'kep'; did you mean 'keep'"):
        fedloom.run("damped", **SETTINGS | {"aggregate": "first_rows:kep=1"})
    with pytest.raises(UsageError, match="stripes: width is 'x', of type str; it must be of type int"):
        fedloom.run("damped", **SETTINGS | {"partition": "stripes:x"})
    with pytest.raises(
        UsageError, match=r"problem 'scaled:1,2': too many positional arguments; scaled takes factor=2.0"
    ):
        fedloom.run("damped", **SETTINGS | {"problem": "scaled:1,2"})
    with pytest.raises(UsageError, match="unknown option of compress: ternary 'leats'; did you mean 'least'"):
        fedloom.run("damped", **SETTINGS | {"compress": "ternary:leats=1"})
    with pytest.raises(UsageError, match="two rules, iid and stripes:2"):
        fedloom.run("damped", **SETTINGS | {"partition": "iid+stripes:2"})


def test_members_run_and_do_what_they_say(extras):
    plain = fedloom.run("damped", "digits", clients=6, partition="stripes:2", rounds=2, lr=0.1)
    dealt = federate(load("digits"), "stripes:2", 6, validation=0)
    assert dealt.train[1][:4].tolist() == [2, 3, 14, 15], "two rows in turn"
    assert plain.spec.method == {"name": "damped", "lr": 0.1, "damping": 0.5}
    scaled = fedloom.run("damped", "digits", clients=6, partition="stripes:2", rounds=2, lr=0.1, problem="scaled:0.5")
    assert metrics(plain) != metrics(scaled)
    whole = fedloom.run("damped", rounds=2, **SETTINGS)
    assert whole.metrics[-1]["attack/malicious"] == 2 and whole.spec.compress == "ternary:0.3"
    up = [sum(row["up_bytes"] for row in run.metrics) for run in (plain, whole)]
    assert up[1] < up[0] / 8, "two bits in place of 32"
    assert whole.manifest["packages"] == ["loom-extras 1.2"]


def test_every_engine_finds_them_and_gives_the_same_bits(extras):
    serial = fedloom.run("damped", rounds=2, **SETTINGS)
    for settings in ({"engine": "pool", "workers": 2}, {"engine": "loopback"}):
        assert metrics(fedloom.run("damped", rounds=2, **SETTINGS, **settings)) == metrics(serial)
    lab = Lab(entry_of("damped").load(Method))
    alike(lab.serial, trace(lab.experiment(engine=Pool(2, start_method="spawn"))), "serial and a spawned pool differ")


def test_a_stopped_run_goes_on_in_another_process(extras, tmp_path):
    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedloom.run("damped", rounds=4, out=tmp_path / "run", on_round=stop, report=False, **SETTINGS)
    other(f"import fedloom; fedloom.resume({str(tmp_path / 'run')!r}, report=False)")
    whole = fedloom.run("damped", rounds=4, **SETTINGS)
    assert metrics(fedloom.Run(tmp_path / "run")) == metrics(whole)


def test_the_command_line_has_the_flags_of_an_added_method(extras, tmp_path, capsys):
    flags = ["--damping", "0.3", "--data", "digits", "--rounds", "1", "--clients", "4", "--out", str(tmp_path / "run")]
    assert main(["run", "damped", *flags]) == 0
    assert fedloom.Run(tmp_path / "run").spec.method["damping"] == 0.3
    capsys.readouterr()
    assert main(["methods", "damped"]) == 0
    assert (
        "loom-extras 1.2" in (said := capsys.readouterr().out) and "--damping" in said and "the part of the way" in said
    )
    assert main(["run", "dampd"]) == 2
    assert "did you mean 'damped'" in capsys.readouterr().err


def test_an_added_method_keeps_the_contract(extras):
    check_method(entry_of("damped").load(Method))


def test_an_instance_is_described_by_its_name_and_compared_in_other_processes(extras):
    from loom_extras.damped import Damped

    mine = Damped(damping=0.3)
    assert mine.to_spec() == {"name": "damped", "lr": 0.05, "damping": 0.3} and known_as(Damped) == "damped"
    assert copy.copy(mine) == mine and build("damped", {"damping": 0.3}) == mine
    results = fedloom.compare([mine, "fedavg"], "digits", seeds=1, rounds=1, clients=4, jobs=2)
    assert not results.failed and list(results.methods) == ["damped", "fedavg"]


def test_a_method_may_pass_through_the_module_that_its_entry_point_names(extras, install):
    text = (extras / "loom_extras" / "damped.py").read_text()
    child = "\n\n@dataclass(frozen=True)\nclass Child(Damped):\n    '''Another?'''\n\n    extra: int = 1  # more\n"
    files = {"again/__init__.py": "from again.inside import Child\n", "again/inside.py": text + child}
    install("again", {"fedloom.methods": {"twice": "again:Child"}}, files)
    (entry,) = [one for one in entries() if one.name == "twice"]
    assert (entry.doc, entry.question, entry.home) == ("", "", "again 1.2") and "again" not in sys.modules
    assert [field[0] for field in entry.fields()] == ["lr", "damping", "extra"]
    method = build("twice", {"extra": 2})
    assert method.name() == "twice" and method.to_spec()["name"] == "twice" and added_name(type(method)) == "twice"
    lab = Lab(method)
    alike(lab.serial, trace(lab.experiment(engine=Pool(2, start_method="spawn"))), "serial and a spawned pool differ")


RULE = """
from dataclasses import dataclass
from fedloom.aggregators import Rule, Verdict

@dataclass(frozen=True)
class Krum(Rule):
    def __call__(self, stack, context):
        return Verdict(stack[0])

@dataclass(frozen=True)
class Mine(Krum):
    pass
"""


def test_a_name_of_the_library_stays_the_librarys(install, caplog):
    install(
        "rival",
        {"fedloom.aggregators": {"krum": "rival:Krum"}, "fedloom.methods": {"fedavg": "rival:No"}},
        {"rival.py": RULE},
    )
    with caplog.at_level(logging.WARNING):
        assert RULES["krum"].__module__ == "fedloom.aggregators.krum" and RULES["krum"]
        assert entry_of("fedavg").folder == "optimize"
    assert [record.getMessage() for record in caplog.records] == [
        "not taken is the package rival 1.2 (entry point krum = rival:Krum in fedloom.aggregators): "
        "the library has the aggregation rule krum itself",
        "not taken is the package rival 1.2 (entry point fedavg = rival:No in fedloom.methods): "
        "the library has the method fedavg itself",
    ]
    assert list(RULES).count("krum") == 1 and "rival" not in sys.modules


def test_a_name_of_two_packages_is_refused(install):
    for name in ("one", "two"):
        install(
            name,
            {"fedloom.aggregators": {"mine": f"{name}:Mine"}, "fedloom.methods": {"m": f"{name}:M"}},
            {f"{name}.py": RULE},
        )
    with pytest.raises(UsageError, match=r"rule mine is added by the package \w+ 1.2 .* and by .*; uninstall one"):
        RULES["mine"]
    with pytest.raises(UsageError, match=r"the method m is added by .* and by "):
        entry_of("m")
    assert sorted(one.home for one in entries() if one.name == "m") == ["one 1.2", "two 1.2"]


@pytest.mark.parametrize(
    ("text", "point", "complaint"),
    [
        (
            "import nothing_like_it",
            "broken:Mine",
            r"cannot load .*broken 1.2 .*ModuleNotFoundError: .*; repair that package",
        ),
        ("1 / 0", "broken:Mine", "ZeroDivisionError"),
        ("", "broken:Mine", "AttributeError: .*no attribute 'Mine'"),
        ("def Mine(): pass", "broken:Mine", "it must be a class that derives from Rule"),
        ("Mine = 3", "broken:Mine", "is 3; it must be a class"),
        ("from fedloom.aggregators import Rule as Mine", "broken:Mine", "without abstract functions"),
        (RULE, "broken:Krum", "calls itself krum; give the entry point that name"),
    ],
)
def test_a_package_that_is_not_sound_stops_who_asks_for_it_alone(install, capsys, text, point, complaint):
    groups = ("fedloom.aggregators", "fedloom.methods", "fedloom.tasks")
    install("broken", {group: {"mine": point} for group in groups}, {"broken.py": text})
    assert "mine" in list(RULES) and RULES["median"] and fedloom.tasks.KINDS["partial"]
    assert main(["methods"]) == 0 and "broken 1.2" in capsys.readouterr().out
    with pytest.raises(UsageError, match=complaint):
        fedloom.run("fedavg", "digits", clients=4, aggregate="mine")
    assert main(["run", "fedavg", "--clients", "4", "--aggregate", "mine"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_function_is_no_method_and_a_number_no_problem(install):
    points = {"fedloom.methods": {"f": "some:f"}, "fedloom.tasks": {"three": "some:three"}}
    install("some", points, {"some.py": "three = 3\ndef f(): pass\n"})
    with pytest.raises(
        UsageError, match=r"the method f of the package some .* it must be a class that derives from Method"
    ):
        build("f")
    with pytest.raises(UsageError, match=r"the problem three of the package some .* is 3; it must be a function"):
        fedloom.run("fedavg", problem="three")


def test_a_name_that_no_setting_can_spell_is_not_taken(install, caplog):
    with caplog.at_level(logging.WARNING):
        install("odd", {"fedloom.aggregators": {"my+rule": "odd:Mine"}}, {"odd.py": RULE})
        assert set(RULES) == set(RULES.own)
    assert "letters, digits, underscores" in caplog.text


def test_owners_that_do_not_fit_the_rows_are_refused(install):
    text = """
from dataclasses import dataclass
import torch
from fedloom.data.rules import Partition

@dataclass(frozen=True)
class Mine(Partition):
    way: str = "short"

    def owners(self, source, clients, seed):
        rows = len(source.train.y) + len(source.test.y)
        owner = torch.zeros(rows - (self.way == "short"), dtype=torch.int32 if self.way == "narrow" else torch.int64)
        owner[-1] = {"many": clients, "none": -2}.get(self.way, 0)
        return owner
"""
    install("own", {"fedloom.partitions": {"mine": "own:Mine"}}, {"own.py": text})
    for way in ("short", "narrow", "many", "none"):
        with pytest.raises(
            UsageError, match=r"the partition Mine gave owners torch.int.* expected int64 \[1797\], a client"
        ):
            fedloom.run("fedavg", "digits", clients=4, partition=f"mine:{way}")


def test_networks_engines_and_trackers_are_added_alike(install):
    text = """
from fedloom.engines.serial import Serial
from fedloom.nets.mlp import perceptron

def tiny(options, shape, classes, vocabulary):
    return perceptron([int(options or 3)], shape, classes)

class Mine(Serial):
    ran = 0
    def run(self, call, clients):
        Mine.ran += 1
        return super().run(call, clients)

class Follower:
    rows = []
    def __init__(self, path, done):
        self.done = done
    def begin(self, spec, manifest):
        self.rows.clear()
    def row(self, metrics):
        self.rows.append(metrics["round"])
    def end(self, status, paths):
        self.rows.append(status)
"""
    points = {"fedloom.networks": "tiny", "fedloom.engines": "Mine", "fedloom.trackers": "Follower"}
    install("many", {group: {place.lower(): f"many:{place}"} for group, place in points.items()}, {"many.py": text})
    run = fedloom.run("fedavg", "digits", clients=4, rounds=2, model="tiny:5", engine="mine", track="follower")
    import many

    assert (
        run.model.layout.size == 64 * 5 + 5 + 5 * 10 + 10 and many.Mine.ran and many.Follower.rows == [1, 2, "finished"]
    )
    for settings in ({"model": "tny"}, {"engine": "mne"}, {"track": "folower"}):
        with pytest.raises(UsageError, match=r"did you mean '(tiny|mine|follower)'"):
            fedloom.run("fedavg", "digits", clients=4, **settings)
