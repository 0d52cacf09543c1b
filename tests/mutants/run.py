"""Do the tests tell each part of the library from its look-alikes?

    python tests/mutants/run.py                         every mutant
    python tests/mutants/run.py methods/fedavg attack   those of some parts, or of whole folders of them
    python tests/mutants/run.py --changed               parts whose source, tests or mutants differ from HEAD

A mutant is a small edit of the library's source that makes a plausible mistake: a sign, a weight, an order, a stale
value. Each is tried in a scratch copy of the source with the tests of its part and, if these let it live, with the
contract of its method. Who survives is printed, and the exit status is 1. Verdicts are kept by the hash of what was
tried in `.mutants.json`; `--fresh` forgets them. How a part is written down: `tests/mutants/README.md`.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "src/fedloom"
MUTANTS = Path(__file__).resolve().parent
PRELOADED = (
    "numpy", "torch", "torch.func", "torch.distributed.tensor", "pytest", "hypothesis.strategies", "yaml",
    "safetensors.torch", "scipy.stats", "scipy.optimize", "pandas", "pyarrow.parquet", "pyarrow.compute", "pyarrow.csv",
    "sklearn.datasets", "sklearn.cluster", "statsmodels.stats.multitest", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "rich.table", "jinja2", "dp_accounting",
)  # fmt: skip
USUAL = 24.0  # seconds that a part's tests are taken to last where they were not tried
PATIENCE = 60.0, 10.0  # seconds, and times what the tests take on the unchanged source: then a mutant counts as killed


@dataclass(frozen=True)
class Mutant:
    """One edit: `old` stands exactly once in `file` (below the package) and becomes `new`."""

    part: str
    file: str
    what: str
    old: str
    new: str
    equivalent: str = ""  # why no test can tell it apart

    def source(self, root: Path) -> Path:
        """The file that it changes."""
        return root / PACKAGE / self.file

    def text(self, root: Path = ROOT) -> str:
        """The file with the mistake in it; raises ValueError if the edit does not fit the file."""
        text = self.source(root).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.part}: {self.old!r} stands {text.count(self.old)} times in {self.file}, not once")
        if self.old == self.new:
            raise ValueError(f"{self.part}: {self.what!r} changes nothing")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Part:
    """A part of the library with its tests and its look-alikes: one TOML file."""

    name: str
    tests: tuple[str, ...]
    contract: str  # the method whose contract is tried as well; "" for none
    mutants: tuple[Mutant, ...] = field(repr=False)

    @staticmethod
    def read(path: Path, mutants: Path = MUTANTS) -> Part:
        """The part that a TOML file describes; raises ValueError or KeyError if it does not."""
        name = path.relative_to(mutants).with_suffix("").as_posix()
        given = tomllib.loads(path.read_text())
        found = tuple(Mutant(part=name, **{"file": given.get("file", "")} | entry) for entry in given["mutant"])
        return Part(name, tuple(given["tests"]), given.get("contract", ""), found)

    def files(self, root: Path) -> set[str]:
        """What its verdicts depend on: sources and tests, from the root."""
        return {f"{PACKAGE}/{mutant.file}" for mutant in self.mutants} | {
            test.partition("::")[0] for test in self.tests
        }

    def stages(self) -> Iterator[tuple[str, ...]]:
        """The arguments to pytest, the quicker run first."""
        yield self.tests
        if self.contract:
            yield "tests/test_contract.py", "-k", f"[{self.contract}-"


def parts(mutants: Path = MUTANTS) -> list[Part]:
    """All parts, by name."""
    return [Part.read(path, mutants) for path in sorted(mutants.rglob("*.toml"))]


@dataclass(frozen=True)
class KillersFirst:
    """A plugin of pytest: tests that killed other mutants come first, those of many cases (of all methods) last."""

    known: Path  # a file of their names, one a line

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Sorts the tests; those that are alike stay in their order."""
        killers = set(self.known.read_text().splitlines()) if self.known.exists() else set()
        cases = Counter(item.nodeid.partition("[")[0] for item in items)
        items.sort(key=lambda item: (item.nodeid not in killers, cases[item.nodeid.partition("[")[0]]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keeps the name of a test that failed."""
        if report.failed:
            with self.known.open("a") as file:
                file.write(f"{report.nodeid}\n")


def verdict(
    root: Path, part: Part, mutant: Mutant | None, patience: float = 600.0, killers: Path | None = None
) -> tuple[str, float]:
    """The verdict and its seconds, of a mutant, or of the unchanged source if there is none.

    `killers` is a folder in which the tests that killed mutants of a part are remembered. The verdict is "survived",
    "killed", "killed by the contract" (by no test of the part's own), or "late".
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "src"
        shutil.copytree(root / "src", copy, copy_function=_linked)
        if mutant is not None:
            changed = copy / Path(PACKAGE).name / mutant.file
            changed.unlink()
            changed.write_text(mutant.text(root))
            for stale in changed.parent.glob(f"__pycache__/{changed.stem}.*"):
                stale.unlink()
        for stage in part.stages() if mutant else (part.tests,):
            plugins = [KillersFirst(killers / part.name.replace("/", "."))] if killers and mutant else []
            status = _tested(root, copy, stage, patience, mutant is not None, plugins)
            if status != 0:
                by = "" if stage == part.tests else " by the contract"
                return ("late" if status is None else f"killed{by}"), time.monotonic() - began
    return "survived", time.monotonic() - began


def _linked(source: str, copy: str) -> None:
    """A second name for a file, or a copy where that is another disk; the date stays, and with it the bytecode."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)


def _tested(
    root: Path, source: Path, arguments: tuple[str, ...], patience: float, silent: bool, plugins: list[KillersFirst]
) -> int | None:
    """Pytest's exit status in a fork of this process, which has torch loaded but not the library; None if too slow."""
    child = os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            if silent:
                _silence()
            os.chdir(root)
            os.environ |= {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # pytest would rewrite the asserts of whole plugins
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(source))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            import pytest

            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", *arguments], plugins))
        finally:
            os._exit(status)
    until = time.monotonic() + patience
    while time.monotonic() < until:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            _end(child)
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.02)
    _end(child)
    os.waitpid(child, 0)
    return None


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)


def _end(group: int) -> None:
    """Kills what is left of a test run, its workers included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _hash(root: Path, part: Part, mutant: Mutant, stages: int) -> str:
    """What a verdict hangs on: the mutant, and the files of the first of the stages, or of both."""
    digest = hashlib.blake2b(digest_size=12)
    tests = sorted({test.partition("::")[0] for test in part.tests})
    for path in [*tests, "tests/problems.py", "tests/conftest.py", *["tests/test_contract.py"][: stages - 1]]:
        digest.update((root / path).read_bytes() if (root / path).exists() else b"")
    digest.update("\0".join([mutant.text(root), part.contract, *part.tests]).encode())
    return digest.hexdigest()


def chosen(found: list[Part], names: list[str], changed: set[str] | None, root: Path = ROOT) -> list[Part]:
    """The parts of those names or folders; of these, only those that a set of changed files touches."""
    for name in names:
        if not any(part.name == name or part.name.startswith(f"{name.rstrip('/')}/") for part in found):
            raise SystemExit(f"no mutants of {name!r}; there are {', '.join(part.name for part in found)}")
    if names:
        found = [p for p in found if any(p.name == n or p.name.startswith(f"{n.rstrip('/')}/") for n in names)]
    if changed is not None:
        found = [p for p in found if changed & (p.files(root) | {f"tests/mutants/{p.name}.toml"})]
    return found


def main() -> int:
    """Tries the mutants asked for; 1 if one survives, or if a part's tests fail without any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PART", help="parts or folders of parts (default: all)")
    parser.add_argument("--changed", action="store_true", help="only parts that differ from --base")
    parser.add_argument("--base", default="HEAD", help="what --changed compares with (default: HEAD)")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier verdicts")
    parser.add_argument(
        "--green", action="store_true", help="the whole suite has just passed: do not try the unchanged source first"
    )
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from differing import changed

    found = chosen(parts(), given.names, changed(ROOT, given.base) if given.changed else None)
    kept_in = ROOT / ".mutants.json"
    kept = json.loads(kept_in.read_text()) if kept_in.exists() and not given.fresh else {}
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # of extras
            importlib.import_module(name)
    compileall.compile_dir(ROOT / "src", quiet=2)
    work = [
        (part, mutant) for part in found for mutant in part.mutants
        if not mutant.equivalent and not any(kept.get(_hash(ROOT, part, mutant, stages)) for stages in (1, 2))
    ]  # fmt: skip
    failing: list[str] = []
    survivors: list[Mutant] = []
    with (
        tempfile.TemporaryDirectory() as killers,
        ProcessPoolExecutor(given.jobs, multiprocessing.get_context("fork")) as pool,
    ):
        untried = [] if given.green else [p for p in found if any(p is part for part, _ in work)]
        bases = {p.name: pool.submit(verdict, ROOT, p, None) for p in untried}
        seconds = dict.fromkeys([p.name for p in found], USUAL)
        for name, base in bases.items():
            outcome, seconds[name] = base.result()
            if outcome != "survived":
                failing.append(name)
                print(f"FAILS      {name}: its tests fail on the unchanged source", flush=True)
        tried = {
            pool.submit(verdict, ROOT, part, mutant, PATIENCE[0] + PATIENCE[1] * seconds[part.name], Path(killers)): (
                part,
                mutant,
            )
            for part, mutant in work
            if part.name not in failing
        }
        for ended in as_completed(tried):
            part, mutant = tried[ended]
            outcome, took = ended.result()
            if outcome == "survived":
                survivors.append(mutant)
                print(f"SURVIVES   {mutant.part}: {mutant.what}", flush=True)
            else:
                print(f"{outcome:10} {mutant.part}: {mutant.what} ({took:.0f} s)", flush=True)
                kept[_hash(ROOT, part, mutant, 2 if outcome.endswith("contract") else 1)] = outcome
                kept_in.write_text(json.dumps(kept, indent=0))
    every = [mutant for part in found for mutant in part.mutants]
    equivalent = sum(bool(mutant.equivalent) for mutant in every)
    print(
        f"{len(every)} mutants of {len(found)} parts: {len(survivors)} survive, {equivalent} equivalent; "
        f"{len(every) - equivalent - len(work)} known to be killed from before"
        + (f"; the tests of {', '.join(failing)} fail without any" if failing else "")
    )
    return 1 if survivors or failing else 0


def misfits(found: list[Part], root: Path = ROOT) -> list[str]:
    """What is wrong with the parts' descriptions: an edit that no longer fits, a test that is not there, ..."""
    wrong = []
    for part in found:
        wrong += [f"{part.name}: no {test}" for test in part.tests if not (root / test.partition("::")[0]).exists()]
        names = [mutant.what for mutant in part.mutants]
        wrong += [f"{part.name}: {name!r} stands twice" for name in {*names} if names.count(name) > 1]
        for mutant in part.mutants:
            try:
                compile(mutant.text(root), mutant.file, "exec")
            except (ValueError, OSError, SyntaxError) as error:
                wrong.append(f"{part.name}: {mutant.what!r}: {error}")
            if mutant.equivalent and not re.search(r"\w+ \w+ \w+", mutant.equivalent):
                wrong.append(f"{part.name}: {mutant.what!r}: say in a line why it is equivalent")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
