"""What the page on deployment tells to type is typed, each command in a process of its own, and keeps its word."""

import os
import shutil
import subprocess
import sys

import pytest
from federation import port
from pages import ROOT, blocks

from fedloom.runs.record import Run

PAGE = blocks(ROOT / "docs/deploy.md")


def test_five_minutes_on_one_laptop(tmp_path):
    pytest.importorskip("aiohttp")
    pytest.importorskip("cryptography")
    at = str(port())
    files = {block.title: block.text.replace("8443", at) for block in PAGE if block.title}
    assert files.keys() == {"spec.yaml", "server.toml", "north.toml", "south.toml", "west.toml"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    commands = [command for block in PAGE if block.language == "sh" for command in block.commands]
    keys, server, *clients, replay = commands
    assert [command.split()[1] for command in commands] == ["certs", "server", "client", "client", "client", "replay"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(command):
        words = [sys.executable, "-m", *command.split()]
        told = subprocess.PIPE
        return subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=told, stderr=subprocess.STDOUT, text=True)

    def ended(process):
        text, _ = process.communicate(timeout=100)
        assert process.returncode == 0, text
        return text

    ended(start(keys))
    running = [start(command) for command in (server, *clients)]
    told = [ended(process) for process in running]
    assert "waiting for" in told[0] and "10 rounds in" in told[0]
    assert all("the run is over" in text for text in told[1:])
    assert "The same bits as deployed." in ended(start(replay))
    ended(start("fedloom run spec.yaml clients=3 --out plain"))
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("deployed", "again", "plain")]
    assert models[0] == models[1] == models[2]
    network = Run(tmp_path / "deployed").manifest["network"]
    assert [client["name"] for client in network] == ["north", "south", "west"]
    assert all(client["up"] > 10_000 and client["down"] > 10_000 for client in network)
    shutil.rmtree(tmp_path / "again")
