"""The mutants fit the source that they change, and the command that tries them tells survivors from the killed."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutants"))

from run import Mutant, Part, chosen, misfits, parts

from fedloom.registry import catalogue

SOURCE = "def half(x):\n    return x / 2\n\n\ndef same(x):\n    return x + 0\n"
TESTS = "from fedloom.parting import half\n\n\ndef test_half():\n    assert half(4) == 2\n"


written = functools.cache(parts)  # read once for all methods


def test_every_mutant_fits_its_source():
    assert not misfits(written())


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
def test_every_method_has_at_least_five(entry):
    own = [p for p in written() if p.name == f"methods/{entry.name}"]
    assert own and len(own[0].mutants) >= 5, f"tests/mutants/methods/{entry.name}.toml has fewer than five mutants"


@pytest.fixture
def small(tmp_path):
    for name, text in {"src/fedloom/parting.py": SOURCE, "tests/test_parting.py": TESTS}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "src/fedloom/__init__.py").write_text("")
    return tmp_path


def part_of(*mutants):
    made = tuple(Mutant("parting", "parting.py", what, old, new) for what, old, new in mutants)
    return Part("parting", ("tests/test_parting.py",), "", made)


def tried(root, part, mutant):
    """The verdict from a process that has not imported the library."""
    import subprocess

    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent / 'mutants')!r})\n"
        "from pathlib import Path; from run import *\n"
        f"print(verdict(Path({str(root)!r}), {part!r}, {mutant!r}, 60)[0])".replace(repr(part), _written(part))
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return out.stdout.split()[-1]


def _written(part):
    return f"Part({part.name!r}, {part.tests!r}, {part.contract!r}, {part.mutants!r})"


def test_a_mistake_that_a_test_sees_is_killed_and_another_survives(small):
    part = part_of(("doubles", "x / 2", "x * 2"), ("adds one", "x + 0", "x + 1"))
    assert tried(small, part, None) == "survived"
    assert tried(small, part, part.mutants[0]) == "killed"
    assert tried(small, part, part.mutants[1]) == "survived"


def test_edits_that_do_not_fit_are_named(small):
    part = part_of(("gone", "x / 3", "x"), ("nothing", "x / 2", "x / 2"), ("no Python", "x / 2", "x /"))
    wrong = misfits([part], small)
    assert len(wrong) == 3 and "stands 0 times" in wrong[0] and "changes nothing" in wrong[1] and "invalid" in wrong[2]


def test_parts_are_chosen_by_name_folder_and_changed_files(small):
    one, other = part_of(("doubles", "x / 2", "x * 2")), Part("attack/zero", ("tests/test_zero.py",), "", ())
    assert chosen([one, other], ["attack"], None, small) == [other]
    assert chosen([one, other], [], {"src/fedloom/parting.py"}, small) == [one]
    assert chosen([one, other], [], {"tests/mutants/attack/zero.toml"}, small) == [other]
    with pytest.raises(SystemExit, match="no mutants of 'fedavgg'"):
        chosen([one, other], ["fedavgg"], None, small)
