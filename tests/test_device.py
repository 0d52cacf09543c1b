"""The tests of `on_device.py`, on CUDA where there is one, and on the device that stands in for it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretend import built

HERE = Path(__file__).parent
GROUPS = {  # each in one process, of whose time four seconds are its start
    "few": "descent or gradient or clients_of_a_batch or noised or views or networks or checkpoint or auto "
    "or kind_of_value or between_clients_and_server or test_contract",
    "steps": "wait_more_often",
    "wire": "over_a_wire",
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("device", ["pretend", "cuda"])
def test_on_a_device(device, group):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if device == "pretend":
        built()
    asked = [str(HERE / "on_device.py"), "--device", device, "-k", GROUPS[group], "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *asked, "-p", "no:xdist"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_every_test_is_in_one_group():
    tests = [line[4:].split("(")[0] for line in (HERE / "on_device.py").read_text().splitlines() if "def test_" in line]
    for name in tests:
        assert sum(any(word in name for word in words.split(" or ")) for words in GROUPS.values()) == 1, name
