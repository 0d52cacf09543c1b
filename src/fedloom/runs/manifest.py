"""What a run was made with: versions, hardware, seed, and how to repeat it."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloom._version import __version__
from fedloom.members import packages
from fedloom.runs.spec import Spec


def manifest(spec: Spec, out: str | Path | None) -> dict[str, Any]:
    """Versions, hardware and seed of a run that begins."""
    again = "task" if spec.partition == "given" else "data"
    return {
        "fedloom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count()},
        "device": torch.cuda.get_device_name(spec.device) if spec.device.startswith("cuda") else "cpu",
        "seed": spec.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "command": f"in Python, with the same {again}: fedloom.run(METHOD, {again.upper()}, ...), settings of spec.yaml"
        if spec.in_python
        else f"fedloom run {Path(out or '.') / 'spec.yaml'} --out NEW_FOLDER",
        "privacy": [],
    } | ({"packages": [*added]} if (added := packages()) else {})


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
