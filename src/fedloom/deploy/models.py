"""What a client would use itself: its own model, which stays with it, in the form in which a run's folder has models.

Which round's model counts is known at the server alone, by everybody's validation: so a round's model is kept when it
is judged, until the server tells that another one counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fedloom._version import __version__
from fedloom.deploy.outbox import AGAIN
from fedloom.method import Method
from fedloom.nets.own import outward
from fedloom.node import Client
from fedloom.runs.fitted import recipe_of
from fedloom.runs.keeping import held, whole
from fedloom.runs.personal import FUNCTION
from fedloom.runs.trained import WHICH
from fedloom.runs.writing import disk, write_aside
from fedloom.task import Task
from fedloom.vector import Vector

UNHEARD = "this client was not asked to judge the round whose model counts"


class Models:
    """The models of one client in the folder `model/` beside its state."""

    def __init__(self, folder: Path, method: Method, task: Task) -> None:
        self.folder, self.method, self.task = folder / "model", method, task

    def keep(self, round: int, client: Client, judged: Any) -> None:
        """Takes what the client would use in a round that is judged."""
        told: dict[str, Any] = {"round": round, "file": None, "why": FUNCTION}
        with disk(self.folder.parent, again=AGAIN):
            self.folder.mkdir(exist_ok=True, mode=0o700)
        if isinstance(judged, Vector):
            w = held(client, judged)
            net = client.net(w.to(client.site.device))
            # As a run's folder has them: a second entry would stand before or after the first as chance has it.
            data = save(outward(net, whole(net)), metadata={"fedloom": f"{__version__}, round {round}"})
            told = {"round": round, "file": f"round-{round}.safetensors", "network": recipe_of(client.site, w.layout)}
            told["learned"] = [*outward(net, dict.fromkeys(w.layout.names))]
            self._write(told["file"], data)
        self._write(f"round-{round}.json", json.dumps(told).encode())

    def forget(self, before: int, rounds: Mapping[str, int]) -> None:
        """Drops the models of rounds before one but those of `rounds`, by which of them each is."""
        for path in self.folder.glob("round-*.json"):
            round = int(path.stem.removeprefix("round-"))
            if round < before and round not in rounds.values():
                path.with_suffix(".safetensors").unlink(missing_ok=True)
                path.unlink()

    def end(self, rounds: Mapping[str, int]) -> Path | None:
        """The run is over: says which models count; gives the folder that `fedloom predict` takes, if there is one."""
        last = rounds.get("last")
        if last is None or not self.folder.exists():
            return None
        counting = {which: rounds.get(which, last) for which in WHICH}
        self.forget(last + 1, counting)
        known = self.task.preprocessing()
        weights = {which: self._told(round) for which, round in counting.items()}
        about = {
            "fedloom": __version__,
            "method": self.method.name(),
            "weights": weights,
            "population": self.task.population,
            "clients": None,
            "preprocessing": known and known.stored(),
            "outputs": dict(self.task.outputs()),
        }
        self._write("model.json", (json.dumps(about, indent=1) + "\n").encode())
        return self.folder.parent if any(one["file"] for one in weights.values()) else None

    def _told(self, round: int) -> dict[str, Any]:
        path = self.folder / f"round-{round}.json"
        if not path.exists():
            return {"round": round, "file": None, "why": UNHEARD}
        told: dict[str, Any] = json.loads(path.read_text())
        return told

    def _write(self, name: str, data: bytes) -> None:
        with disk(self.folder, again=AGAIN):
            write_aside(self.folder / name, lambda file: file.write(data), private=True, durable=True)
