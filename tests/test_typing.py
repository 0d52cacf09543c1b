"""What a type checker says of programs that use the package: of settings, fields and methods, and of the examples."""

import re
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[1]
api = pytest.importorskip("mypy.api", reason="pip install mypy")

# What a user's own settings may be; the package itself is checked by `make lint`.
CONFIG = """
[mypy]
check_untyped_defs = true
ignore_missing_imports = true
[mypy-fedloom.*]
ignore_errors = true
"""


def told(folder, *files):
    """What mypy says, and whether it is content. Its cache stays, for torch takes it half a minute."""
    (folder / "mypy.ini").write_text(CONFIG)
    own = ["--config-file", str(folder / "mypy.ini"), "--cache-dir", str(TREE / ".mypy_cache" / "users")]
    said, _, code = api.run([*own, *map(str, files)])
    return said, code == 0


def test_a_type_checker_knows_settings_fields_and_methods(tmp_path):
    (tmp_path / "right.py").write_text(
        "import fedloom\n"
        'run = fedloom.run("fedprox", "digits", mu=0.1, rounds=50, exclude=["id"])\n'
        "fedloom.run(fedloom.FedProx(mu=0.1), clients=4)\n"
        'fedloom.compare([fedloom.FedAvg, "fedprox:mu=0.1"], seeds=2, tune=3)\n'
        "print(run.final)\n"
    )
    (tmp_path / "wrong.py").write_text(
        "import fedloom\n"
        'fedloom.run("fedprox", roundz=3)\n'
        'fedloom.run("fedprox", rounds="three")\n'
        'fedloom.run("fedprox", mu=[1])\n'
        "fedloom.FedPorx()\n"
    )
    said, content = told(tmp_path, tmp_path / "right.py", tmp_path / "wrong.py")
    lines = [line for line in said.splitlines() if ".py:" in line and "note:" not in line]
    assert not content and all("wrong.py:" in line for line in lines), said
    assert {int(line.split(":")[1]) for line in lines} == {2, 3, 4, 5}, said


def test_the_examples_are_typed_as_they_use_the_package(tmp_path):
    texts = [path.read_text() for path in sorted((TREE / "examples").glob("*.py"))]
    blocks = re.findall(r"```python\n(.*?)```", (TREE / "README.md").read_text(), re.DOTALL)
    texts += [text for text in blocks if "fedloom" in text]
    files = []
    for number, text in enumerate(texts):
        files.append(tmp_path / f"example_{number}.py")
        files[-1].write_text(text)
    said, content = told(tmp_path, *files)
    assert content and len(files) > 1, said
