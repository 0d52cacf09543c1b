"""The settings of PyTorch under which a run gives the same bits again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


def make_reproducible(device: str, threads: int) -> None:
    """Another number of threads may change the last bits of a result; so may CUDA from one time to the next.

    An operation for which CUDA knows no way to the same bits warns, and is done all the same.
    """
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.backends.cudnn.benchmark = False
        torch.set_deterministic_debug_mode("warn")
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def reproducible(device: str, threads: int) -> Iterator[None]:
    """These settings for the length of a run."""
    benchmark = torch.backends.cudnn.benchmark
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    make_reproducible(device, threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if device.startswith("cuda"):
            torch.backends.cudnn.benchmark = benchmark
            torch.set_deterministic_debug_mode(mode)
            deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
