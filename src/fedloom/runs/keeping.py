"""The models that a run keeps, of the round that validation chooses and of the last one; written when it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import nn

from fedloom import encoding
from fedloom._version import __version__
from fedloom.node import Server
from fedloom.runs.parts import Parts
from fedloom.vector import Vector

if TYPE_CHECKING:
    from fedloom.runs.record import Run


@dataclass(frozen=True)
class Judged:
    """What was judged on the global test in a round: a model, or else why it is no one's to hand out."""

    round: int
    model: Vector | None
    why: str = ""

    @staticmethod
    def of(parts: Parts, round: int, judged: Any) -> Judged:
        """A copy of what `evaluate` judged; of several models the main one."""
        name, task = parts.method.name(), type(parts.task).__name__
        if not parts.method.global_model:
            return Judged(round, None, f"{name} learns no global model")
        if isinstance(judged, Mapping):
            judged = next(iter(judged.values()))
        if parts.task.judges_values or not isinstance(judged, Vector):
            what = f"a {task} is judged by values" if parts.task.judges_values else "it is judged by a function"
            return Judged(round, None, f"{what}, which {name} makes of more than one network's weights")
        return Judged(round, held(parts.server, judged))


def held(server: Server, w: Vector) -> Vector:
    """A copy of a model as the server runs it: with the running statistics that it keeps to itself."""
    if server.site.buffers == "local":
        return Vector.of(server.net(w), w.layout).to("cpu")
    return w.to("cpu").clone()


class Kept:
    """The two models of a run; no others are kept, however many rounds there are."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.found: dict[str, Judged] = {}

    def judged(self, which: str, round: int, judged: Any) -> None:
        """Takes what was judged in a round for the `chosen` or the `last`, in place of what was so before."""
        self.found[which] = Judged.of(self.parts, round, judged)

    def state(self) -> dict[str, Any]:
        """Of which rounds the models are, and why there are none."""
        return {"kept": {which: {"round": one.round, "why": one.why} for which, one in self.found.items()}}

    def frames(self) -> Iterator[bytes]:
        """Each model that there is."""
        return (encoding.encode({"model": one.model}) for one in self.found.values() if one.model is not None)

    def restore(self, state: Mapping[str, Any], frames: Iterator[dict[str, Any]]) -> None:
        """Takes up what `state` and `frames` gave; of an older checkpoint nothing."""
        for which, told in state.get("kept", {}).items():
            self.found[which] = Judged(told["round"], None if told["why"] else next(frames)["model"], told["why"])

    def write(self, run: Run, round: int, durable: bool) -> None:
        """The folder `model/`: weights by which nets are loaded strictly, and all that is needed to use them."""
        task, last = self.parts.task, self.found.get("last")
        if last is None or last.round != round:  # it was ended after a round that nobody knew to be the last
            self.judged("last", round, self.parts.server.model)
        self.found.setdefault("chosen", self.found["last"])  # nothing was there to choose by
        known = task.preprocessing()
        about: dict[str, Any] = {
            "fedloom": __version__,
            "method": self.parts.method.name(),
            "weights": {which: self._written(run, which, one, durable) for which, one in self.found.items()},
            "preprocessing": known and known.stored(),
            "outputs": dict(task.outputs()),
        }
        text = json.dumps(about, indent=1) + "\n"
        run.write("model/model.json", lambda file: file.write(text.encode()), durable)

    def _written(self, run: Run, which: str, one: Judged, durable: bool) -> dict[str, Any]:
        """Writes the weights of one model; what `model.json` says of them."""
        if one.model is None:
            return {"round": one.round, "file": None, "why": one.why}
        net = self.parts.server.net(one.model.to(self.parts.site.device))
        # A second entry would stand before or after the first as chance has it, and the file's bytes with it.
        data = save(whole(net), metadata={"fedloom": f"{__version__}, round {one.round}"})
        run.write(f"model/{which}.safetensors", lambda file: file.write(data), durable)
        if which == "last":
            run.link("model.safetensors", "model/last.safetensors")
        if (recipe := self.parts.recipe_of(one.model.layout)) is None:
            run.forms[which] = net
        return {
            "round": one.round,
            "file": f"{which}.safetensors",
            "network": recipe,
            "learned": list(one.model.layout.names),
        }


def whole(net: nn.Module) -> dict[str, Any]:
    """All of a network by name: parameters and buffers, frozen ones too, tied ones under each of their names."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in net.state_dict().items()}
