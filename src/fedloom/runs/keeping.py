"""The models that a run keeps, of the round that validation chooses and of the last one; written when it ends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import nn

from fedloom import encoding
from fedloom._version import __version__
from fedloom.evaluator import Evaluator
from fedloom.nets.own import bare, outward
from fedloom.runs.confusion import FILE
from fedloom.runs.counting import confusions
from fedloom.runs.evaluation import Subject
from fedloom.runs.parts import Parts
from fedloom.runs.personal import ELSEWHERE, FUNCTION, models, personalises
from fedloom.runs.states import States
from fedloom.runs.trained import WHICH
from fedloom.vector import Layout, Vector

if TYPE_CHECKING:
    from fedloom.runs.record import Run


@dataclass(frozen=True)
class Judged:
    """What was judged in a round: a model on the global test, or else why there is none to hand out.

    `clients` has the model of each client, where the method makes some; `lacking` says why none, of those that have
    none.
    """

    round: int
    model: Vector | None
    why: str = ""
    clients: States = field(default_factory=States)
    lacking: str = ""


def held(node: Evaluator, w: Vector) -> Vector:
    """A copy of a model as a node runs it: with the running statistics that it keeps to itself."""
    if node.site.buffers == "local":
        return Vector.of(node.net(w), w.layout).to("cpu")
    return w.to("cpu").clone()


class Kept:
    """The models of two rounds; no others are kept, however many rounds there are."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.found: dict[str, Judged] = {}
        self.nets: dict[Layout, nn.Module] = {}  # one of each layout, which holds the model that was written last

    def judged(self, which: Iterable[str], round: int, subject: Subject) -> None:
        """Takes what was judged in a round for the `chosen`, the `last` or both, in place of what was so before."""
        model, why = self._global(subject.model)
        clients, lacking = States(), ""
        if personalises(self.parts.method) and not self.parts.engine.keeps_states:
            lacking = ELSEWHERE
            self.parts.engine.judged(which, round)
        elif personalises(self.parts.method) and not self.parts.spec.blind:
            for client, one in models(self.parts, round, subject):
                if isinstance(one, Vector):
                    clients[client.id] = {"model": held(client, one)}
                else:
                    lacking = FUNCTION
        self.found |= dict.fromkeys(which, Judged(round, model, why, clients, lacking))

    def _global(self, judged: Any) -> tuple[Vector | None, str]:
        """A copy of what stood for the global model, of several the main one; or why it is no one's to hand out."""
        if not self.parts.method.global_model:
            return None, f"{self.parts.method.name()} learns no global model"
        if isinstance(judged, Mapping):
            judged = next(iter(judged.values()))
        if self.parts.task.judges_values:
            return None, f"a {type(self.parts.task).__name__} is judged by values, not by a network"
        return (held(self.parts.server, judged), "") if isinstance(judged, Vector) else (None, FUNCTION)

    def state(self) -> dict[str, Any]:
        """Of which rounds and clients the models are, and why there are none."""
        return {
            "kept": {
                which: {"round": one.round, "why": one.why, "lacking": one.lacking, **one.clients.state()}
                for which, one in self.found.items()
            }
        }

    def frames(self) -> Iterator[bytes]:
        """Each model that there is."""
        for one in self.found.values():
            if one.model is not None:
                yield encoding.encode({"model": one.model})
            yield from one.clients.frames()

    def restore(self, state: Mapping[str, Any], frames: Iterator[dict[str, Any]]) -> None:
        """Takes up what `state` and `frames` gave; of an older checkpoint nothing."""
        for which, told in state.get("kept", {}).items():
            model = None if told["why"] else next(frames)["model"]
            clients = States()
            clients.restore(told, frames)
            self.found[which] = Judged(told["round"], model, told["why"], clients, told["lacking"])
            if told["lacking"] == ELSEWHERE:
                self.parts.engine.judged([which], told["round"])

    def write(self, run: Run, round: int, durable: bool) -> None:
        """The folder `model/`: weights by which nets are loaded strictly, and all that is needed to use them."""
        task, last = self.parts.task, self.found.get("last")
        if last is None or last.round != round:  # it was ended after a round that nobody knew to be the last
            everybody = self.parts.everybody
            self.judged(["last"], round, Subject(self.parts.server.model, everybody, self.parts.boundary.books.nth))
        self.found.setdefault("chosen", self.found["last"])  # nothing was there to choose by
        known = task.preprocessing()
        about: dict[str, Any] = {
            "fedloom": __version__,
            "method": self.parts.method.name(),
            "weights": {which: self._written(run, which, durable) for which in WHICH},
            "population": task.population,
            "clients": {which: self._of_clients(run, which) for which in WHICH}
            if personalises(self.parts.method)
            else None,
            "preprocessing": known and known.stored(),
            "outputs": dict(task.outputs()),
        }
        if durable:
            run.sync()
        chosen = self.found["chosen"]
        own = chosen.clients if about["clients"] else {}
        if not self.parts.spec.blind and (found := confusions(self.parts, chosen.round, chosen.model, own)):
            run.write_json(FILE, found)
        self.nets.clear()
        text = json.dumps(about, indent=1) + "\n"
        run.write("model/model.json", lambda file: file.write(text.encode()), durable)

    def _holding(self, w: Vector) -> nn.Module:
        """A network that holds a model until the next one of its layout is asked for."""
        net = self.nets[w.layout] = self.parts.server.net(w.to(self.parts.site.device), self.nets.get(w.layout))
        return net

    def _written(self, run: Run, which: str, durable: bool) -> dict[str, Any]:
        """Writes the weights of one global model; what `model.json` says of them."""
        one = self.found[which]
        if one.model is None:
            return {"round": one.round, "file": None, "why": one.why}
        net = self._holding(one.model)
        file = self._save(run, which, one.round, outward(net, whole(net)), durable)
        if which == "last":
            run.link("model.safetensors", f"model/{file}")
        return {"round": one.round, "file": file, **self._form(run, which, one.model.layout, net)}

    def _form(self, run: Run, name: str, layout: Layout, net: nn.Module) -> dict[str, Any]:
        """What a network can be built of, and the names of what was learned of it."""
        if (recipe := self.parts.recipe_of(layout)) is None:
            run.forms[name] = bare(net)
        return {"network": recipe, "learned": list(outward(net, dict.fromkeys(layout.names)))}

    def _of_clients(self, run: Run, which: str) -> dict[str, Any]:
        """Writes each client's model, and once for all what is frozen in it; what `model.json` says of them."""
        one, forms = self.found[which], dict[Layout, dict[str, Any]]()
        told: dict[str, Any] = {}
        for client in sorted(one.clients):
            w: Any = one.clients[client]["model"]
            net = self._holding(w)
            frozen = {name for name, p in net.state_dict(keep_vars=True).items() if self._is_frozen(name, p, w.layout)}
            weights = whole(net)
            if w.layout not in forms:
                name = f"{which}-network-{len(forms)}"
                rest = {entry: weights[entry] for entry in frozen}
                common = self._save(run, f"{name}-frozen", one.round, outward(net, rest), False) if frozen else None
                forms[w.layout] = {"name": name, "frozen": common, **self._form(run, name, w.layout, net)}
            own = {entry: value for entry, value in weights.items() if entry not in frozen}
            file = self._save(run, f"{which}-client-{client}", one.round, outward(net, own), False)
            told[str(client)] = {"file": file, "network": [*forms].index(w.layout)}
        return {"round": one.round, "why": one.lacking, "networks": [*forms.values()], "of": told}

    @staticmethod
    def _is_frozen(name: str, value: Any, layout: Layout) -> bool:
        return isinstance(value, nn.Parameter) and name not in layout.places

    def _save(self, run: Run, name: str, round: int, weights: Mapping[str, Any], durable: bool) -> str:
        # A second entry would stand before or after the first as chance has it, and the file's bytes with it.
        data = save(dict(weights), metadata={"fedloom": f"{__version__}, round {round}"})
        run.write(f"model/{name}.safetensors", lambda file: file.write(data), durable)
        return f"{name}.safetensors"


def whole(net: nn.Module) -> dict[str, Any]:
    """All of a network by name: parameters and buffers, frozen ones too, tied ones under each of their names."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in net.state_dict().items()}
