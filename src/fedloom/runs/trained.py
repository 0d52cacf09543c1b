"""What a run has learned, as a network of plain PyTorch and as predictions on raw rows: from its folder `model/`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom.data.preprocessing import Preprocessing
from fedloom.data.rows import inputs
from fedloom.errors import UsageError, unknown
from fedloom.nets.own import bare
from fedloom.nets.recipes import made
from fedloom.random import seeded
from fedloom.runs.export import ENDINGS, export
from fedloom.runs.reading import damaged, object_of, readable, understood
from fedloom.vector import Layout, Vector

if TYPE_CHECKING:
    from collections.abc import Mapping

WHICH = ("chosen", "last")
AT_ONCE = 1000  # rows in one forward pass
PIXELS_AT_ONCE = 2**18  # of images whose masks are predicted


class Trained:
    """The folder `model/` of a run, in which weights lie beside all that it takes to use them."""

    def __init__(self, run: Path, forms: Mapping[str, nn.Module] | None = None) -> None:
        self.run, self.folder = run, run / "model"
        self.forms = forms or {}  # networks, by round, of the process that trained them

    @property
    def about(self) -> dict[str, Any]:
        """What `model.json` says; raises UsageError if there is none."""
        path = self.folder / "model.json"
        if not path.is_file():
            raise UsageError(
                f"{self.run} has no model yet: it is written when a run ends, and not while tuning; go on with it: "
                f"fedloom resume {self.run}"
            )
        with readable(path):
            return object_of(path, path.read_bytes())

    def module(self, which: str = "chosen", into: nn.Module | None = None) -> nn.Module:
        """The network with the weights of a round, `chosen` (by validation) or `last`, in evaluation mode, on the CPU.

        `into` is a network of the same form that takes the weights, where the run's folder cannot build one. Raises
        UsageError where there is no such model.
        """
        if which not in WHICH:
            raise unknown("round of a model", which, WHICH)
        with understood(self.folder):
            told = self.about["weights"][which]
            if told["file"] is None:
                raise UsageError(f"{self.run} has no global model: {told['why']}")
            net, weights = into or self._built(told["network"], which), self.folder / told["file"]
        return self._loaded(net, weights)

    def vector(self) -> Vector:
        """What was learned of the global model's last round; `model/` may be lacking: older records have none."""
        told = self.about["weights"]["last"] if (self.folder / "model.json").exists() else {}
        if told and told["file"] is None:
            raise UsageError(f"{self.run} has no global model: {told['why']}")
        weights = read(self.run / "model.safetensors")
        found = {name: value for name, value in weights.items() if name in told.get("learned", weights)}
        layout = Layout(tuple(found), tuple(tuple(value.shape) for value in found.values()), len(found))
        return Vector(layout.flatten([*found.values()]), layout)

    def client_module(self, client: int, which: str = "chosen", into: nn.Module | None = None) -> nn.Module:
        """The network that a client would use: its own, or the global one where the method makes no others."""
        if which not in WHICH:
            raise unknown("round of a model", which, WHICH)
        with understood(self.folder):
            about = self.about
            if not isinstance(client, int) or not 0 <= client < about["population"]:
                raise UsageError(
                    f"{self.run} has no client {client!r}; they are numbered from 0 to {about['population'] - 1}"
                )
            personal = about["clients"]
            if personal is None:
                return self.module(which, into)
            told = personal[which]
            if (own := told["of"].get(str(client))) is None:
                why = told["why"] or f"of so many clients those that were judged have one: {len(told['of'])} of them"
                raise UsageError(f"{self.run} has no model of client {client}: {why}")
            form = told["networks"][own["network"]]
            net = into or self._built(form["network"], form["name"])
            files = [own["file"], *filter(None, [form["frozen"]])]
        return self._loaded(net, *(self.folder / file for file in files))

    def export(self, to: str, out: Path | None, client: int | None, which: str, example: Tensor | None = None) -> Path:
        """Writes a network for other programs: see `Run.export`."""
        net = self.module(which) if client is None else self.client_module(client, which)
        recipe = self.recipe(client, which)
        name = which if client is None else f"{which}-client-{client}"
        path = out or self.folder / f"{name}{ENDINGS.get(to, '')}"
        if out is None and to == "peft":
            path = self.folder / f"{name}-adapter"
        export(net, to, path, example, recipe)
        return path

    def recipe(self, client: int | None, which: str) -> Mapping[str, Any] | None:
        """What the network of a round, or that of a client, is built of."""
        with understood(self.folder):
            about = self.about
            if client is None or about["clients"] is None:
                told: Mapping[str, Any] | None = about["weights"][which]["network"]
                return told
            personal = about["clients"][which]
            form: Mapping[str, Any] | None = personal["networks"][personal["of"][str(client)]["network"]]["network"]
            return form

    def _built(self, recipe: Mapping[str, Any] | None, which: str) -> nn.Module:
        if recipe is None and which in self.forms:
            return copy.deepcopy(self.forms[which])
        if recipe is None:
            raise UsageError(
                f"the network of {self.run} was made in Python or by its method, and no recipe builds it; give one of "
                "the same form to load the weights into: run.module(into=MyNetwork())"
            )
        with seeded(0, "model", "loaded"):  # the weights that it begins with move no stream of the user's
            return bare(made(recipe))

    def _loaded(self, net: nn.Module, *paths: Path) -> nn.Module:
        """The network with the weights of some files, each entry in one of them."""
        weights = {name: value for path in paths for name, value in read(path).items()}
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise UsageError(
                f"the weights of {paths[0]} do not fit the network: {' '.join(str(error).split())[:300]}"
            ) from None
        return net.requires_grad_(False).eval()

    def predict(
        self, x: Any, client: int | None = None, which: str = "chosen", probabilities: bool = False
    ) -> tuple[list[Any], list[str]]:
        """Predictions for raw rows, one each, and what is to be told of the rows: see `Run.predict`."""
        with understood(self.folder):
            about = self.about
            stored, meaning = about["preprocessing"], about["outputs"]
            how = stored and Preprocessing.restored(stored)
        if how is None and not isinstance(x, Tensor):
            raise UsageError(
                f"{self.run} was trained on a task given in Python, and knows nothing of raw rows; give a tensor of "
                "inputs as that task's data have them"
            )
        net = self.module(which) if client is None else self.client_module(client, which)
        rows, told = inputs(x, how) if how else (x, [])
        if how and how.sequence:
            there = ~rows.isnan().flatten(1).all(1)
            found = iter(answers(scores(net, rows[there]), meaning, probabilities))
            return [next(found) if one else None for one in there.tolist()], told
        if meaning["kind"] == "mask":
            return masks(net, rows, meaning["classes"], probabilities), told
        return answers(scores(net, rows), meaning, probabilities), told


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


@torch.no_grad()
def scores(net: nn.Module, x: Tensor) -> Tensor:
    """What a network puts out for inputs [N, ...]."""
    return torch.cat([net(part) for part in x.split(AT_ONCE)])


def masks(net: nn.Module, x: Tensor, classes: Sequence[str], probabilities: bool) -> list[Any]:
    """The masks of images [N, C, H, W], arrays uint8 [H, W] of numbers of classes; or probabilities [classes, H, W]."""
    values, found = torch.tensor([*map(int, classes)], dtype=torch.uint8), []
    for part in x.split(max(1, PIXELS_AT_ONCE // x[0, 0].numel())):
        out = scores(net, part)
        found += [*(out.double().softmax(1) if probabilities else values[out.argmax(1)]).numpy()]
    return found


def answers(out: Tensor, meaning: Mapping[str, Any], probabilities: bool) -> list[Any]:
    """What outputs [N, ...] say: names of classes, amounts, lists of labels, or shares; or probabilities by name."""
    if meaning["kind"] in ("class", "shares"):
        classes: Sequence[str] = meaning["classes"]
        if meaning["kind"] == "class" and not probabilities:
            return [classes[place] for place in out.argmax(1).tolist()]
        return [dict(zip(classes, row, strict=True)) for row in out.double().softmax(1).tolist()]
    if meaning["kind"] == "labels":
        names = meaning["labels"]
        chances = [dict(zip(names, row, strict=True)) for row in out.double().sigmoid().tolist()]
        if probabilities:
            return chances
        return [[name for name, there in zip(names, row, strict=True) if there] for row in (out > 0).tolist()]
    if probabilities:
        raise UsageError("the model predicts amounts, of which it has no probabilities; leave probabilities out")
    if meaning["kind"] == "amount":
        found: list[float] = (out.double().squeeze(1) * meaning["deviation"] + meaning["mean"]).tolist()
        return found
    return out.tolist()
