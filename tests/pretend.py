"""The device `pretend`, which stands in for CUDA where there is none; its code is `pretend.cpp`."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCE = Path(__file__).with_suffix(".cpp")


@cache
def built() -> Path:
    """The device's code, compiled once a machine and PyTorch; skips where there is no compiler for it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler here for the device that stands in for CUDA")
    home = Path(torch.__file__).parent
    named = hashlib.sha256(f"{torch.__version__} {home}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    kept = os.environ.get("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # memory may refuse to be executed
    made = Path(kept) / f"fedloom-pretend-{os.getuid()}-{named}.so"
    if not made.exists():
        half = made.with_suffix(f".{os.getpid()}")
        includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", abi]
        links = [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
        asked = [compiler, *flags, *includes, str(SOURCE), *links, "-o", str(half)]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode:
            wrong = next((line for line in done.stderr.splitlines() if "error" in line), "no line says why")
            pytest.skip(f"{compiler} cannot compile the device that stands in for CUDA: {wrong}")
        half.replace(made)
    return made


@cache
def library() -> ctypes.CDLL:
    """The device's code, in this process from now on."""
    return ctypes.CDLL(str(built()))


@cache
def pretend() -> torch.device:
    """Makes the device known to PyTorch, and to this process's experiments.

    That is done before anything is differentiated, and afterwards this process can fork no worker that trains.
    """
    library()
    module = types.ModuleType("torch.pretend")
    module.device_count, module.current_device = (lambda: 1), (lambda: 0)
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None  # its kernels draw from the processor's generator
    torch.utils.rename_privateuse1_backend("pretend")
    torch._register_device_module("pretend", module)
    ForkingPickler.register(torch.Tensor, _reduced(ForkingPickler._extra_reducers[torch.Tensor]))
    from fedloom.runs import fitted

    known = fitted.device_named
    fitted.device_named = lambda name: name if name == "pretend" else known(name)
    return torch.device("pretend")


def _reduced(as_before):
    return lambda tensor: (_there, (tensor.cpu().numpy(),)) if tensor.device.type == "pretend" else as_before(tensor)


def _there(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(pretend())


def device(name: str) -> str:
    """The device of that name, if it is here; otherwise skips and says so."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if name == "pretend":
        pretend()
    return name


@contextmanager
def unwaited(name: str) -> Iterator[None]:
    """Inside, whatever would wait for the device is an error."""
    if name == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
    else:
        before = library().watch(1)
    try:
        yield
    finally:
        if name == "cuda":
            torch.cuda.set_sync_debug_mode(before)
        else:
            library().watch(before)
