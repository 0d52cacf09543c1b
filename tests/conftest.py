"""What every test may ask for."""

import contextlib
import errno
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import choosing
import differing
import pytest
import torch

torch.set_num_threads(1)  # small tensors: a second thread only costs

os.environ["FEDLOOM_CACHE"] = ""  # features are not kept, but where a test says so

MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**30:
    # The tests write and remove the records of some ten thousand runs, and a disk's file system makes work of each.
    # What pytest keeps from one session to the next stays on the disk.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    tempfile.tempdir = str(MEMORY)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="pretend", help="where tests/on_device.py runs: pretend or cuda")
    parser.addoption(
        "--method", action="append", help="run only what concerns this method, and those that derive from it or wrap it"
    )
    parser.addoption(
        "--changed",
        metavar="BASE",
        help="run only what concerns the methods changed since this branch left BASE; everything, if anything else was",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "nightly" not in (config.getoption("-m") or ""):
        why = pytest.mark.skip(reason="minutes, and gigabytes of memory and disk: run it with `pytest -m nightly -s`")
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(why)
    named, base = {*(config.getoption("--method") or ())}, config.getoption("--changed")
    if not named and not base:
        return
    modules, own = choosing.imports(), choosing.own_tests()
    if unknown := named - modules.keys():
        raise pytest.UsageError(f"--method {min(unknown)}: no method has this name; `fedloom methods` lists them")
    try:
        found = choosing.touched(differing.changed_in_branch(choosing.ROOT, base) if base else (), modules, own)
    except ValueError as error:
        raise pytest.UsageError(f"--changed {base}: {error}") from error
    if found is None:
        return
    chosen = choosing.with_dependents(found | named, modules)
    kept, left = [], []
    for item in items:
        (kept if choosing.concerns(item, chosen, own) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_collection_finish() -> None:
    # Half a million objects of imported modules and collected tests stay to the end. Frozen, they are not looked
    # through again at every collection, nor copied into each forked worker by its own.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def drawn() -> None:
    """What a test draws without a generator of its own does not depend on the tests that ran before it."""
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of certificates for a server and for clients from a to h; skips where the extra is missing."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("cryptography")
    from federation import keys

    folder: Path = keys(tmp_path_factory.mktemp("federation"))
    return folder


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """The folder of a real data set that users do not have: skips, with the reason, where it is absent."""

    def folder(name: str) -> Path:
        path = SHARED / name
        if not path.is_dir():
            pytest.skip(f"{path} is not on this machine")
        return path

    return folder


@pytest.fixture
def full_disk() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with full_disk(name, ...)`: the next write to a file of each name finds the disk full."""

    @contextlib.contextmanager
    def full(*names: str) -> Iterator[None]:
        left = set(names)
        opened, written = os.open, os.write

        def met(path: str) -> bool:
            found = Path(path).name in left
            left.discard(Path(path).name)
            return found

        def opens(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT and met(str(path)):
                path, flags = "/dev/full", flags & ~os.O_EXCL
            return opened(path, flags, *rest, **more)

        def writes(end: int, data: Any) -> int:
            if met(str(Path(f"/proc/self/fd/{end}").readlink())):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written(end, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", opens)
            patch.setattr(os, "write", writes)
            yield

    return full
