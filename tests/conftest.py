"""What every test may ask for."""

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # small tensors: a second thread only costs

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="pretend", help="where tests/on_device.py runs: pretend or cuda")


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
