"""The benchmarks still run: what they measure is theirs to say."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_the_engines_beside_the_bare_loop():
    done = subprocess.run(
        [sys.executable, FOLDER / "engines.py", "B", "-n", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split()[:2] == ["job", "engine"]
    assert [line.split()[:3] for line in lines] == [
        ["B", "serial", "1"],
        ["B", "vectorized", "1"],
        ["B", "vectorized", "2"],
    ]
    assert all(float(line.split()[5]) > 0 for line in lines)
