"""Fine-tuning a pretrained model: the vector is the trained part, the frozen backbone is shared and never sent.

`pip install "manyhands[llm]"` (transformers and PEFT). The setting `model` is a folder, a name of the hub, or
`gpt2:WIDTH,LAYERS` for a small causal model with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyhands.data.load import load
from manyhands.data.partition import federate, natural_columns
from manyhands.data.text import PADDING, UNKNOWN
from manyhands.errors import UsageError, unknown
from manyhands.nets.adapters import SCALE, LowRank, make_room
from manyhands.random import seeded, stream
from manyhands.task import Batch, Scores
from manyhands.tasks.classification import Classification
from manyhands.tasks.toy import Toy

if TYPE_CHECKING:
    from manyhands.spec import Spec
    from manyhands.task import Data

KINDS = ("lora", "prompt", "bias", "full")
LONGEST = 64  # tokens of a text; what follows is cut


@dataclass(frozen=True)
class Finetune(Classification):
    """Texts and a pretrained encoder (`model`), of which `kind` says what is trained beside the head.

    `lora`: low-rank factors of `rank` in attention; `prompt`: so many virtual tokens; `bias`: biases; `full`: all.
    """

    kind: str = "lora"
    rank: int = 8
    padding: int = 0  # the token that says nothing
    seed: int = 0  # of a backbone with random weights

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
        backbone = pretrained(self.model, len(self.federation.vocabulary), self.federation.x.shape[1], self.seed)
        own = copy.deepcopy(backbone, {} if self.kind == "full" else {id(p): p for p in backbone.parameters()})
        width = backbone.config.hidden_size
        return Tuned(trained(own, self.kind, rank), nn.Linear(width, len(self.federation.classes)), self.padding)


class CausalModel(Finetune):
    """Next-token prediction: trained at every place of a window, judged at its end."""

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(net, Tuned)
        states = net.body.states(batch.x)
        targets = torch.cat([batch.x[:, 1:] - 2, batch.y[:, None]], 1)  # characters are classes in the tokens' order
        scores = net.head(states)
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-2)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        measured = super().judge(scores, data)
        return measured | {"perplexity": float(torch.tensor(measured["loss"]).exp())}


class Body(nn.Module):
    """A pretrained encoder: features [B, D] of tokens [B, L], their mean over what is no padding, or the last state."""

    def __init__(self, encoder: nn.Module, padding: int, causal: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.padding, self.causal = padding, causal

    def states(self, x: Tensor) -> Tensor:
        """The last hidden states [B, L, D]; those of virtual tokens are left out."""
        mask = (x != self.padding).long()
        out: Tensor = self.encoder(input_ids=x, attention_mask=mask).last_hidden_state[:, -x.shape[1] :]
        return out

    def forward(self, x: Tensor) -> Tensor:
        states = self.states(x)
        if self.causal:
            return states[:, -1]
        mask = (x != self.padding).unsqueeze(2).to(states)
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


class Tuned(nn.Module):
    """`head(body(x))`, as every network."""

    def __init__(self, encoder: Any, head: nn.Linear, padding: int) -> None:
        super().__init__()
        self.body = Body(encoder, padding, encoder.config.model_type == "gpt2")
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def trained(backbone: Any, kind: str, rank: int) -> nn.Module:
    """A backbone of which only what `kind` names requires gradients."""
    if kind == "full":
        whole: nn.Module = backbone.requires_grad_(True)
        return whole
    backbone.requires_grad_(False)
    if kind == "bias":
        for name, param in list(backbone.named_parameters()):
            if name.endswith("bias"):
                owner = backbone.get_submodule(name.rpartition(".")[0])
                setattr(owner, "bias", nn.Parameter(param.detach().clone()))  # noqa: B010 - not the shared one
        biased: nn.Module = backbone
        return biased
    peft = library("peft")
    if kind == "lora":
        gpt = backbone.config.model_type == "gpt2"
        targets = ["c_attn"] if gpt else ["query", "value"] if backbone.config.model_type == "bert" else None
        asked = peft.LoraConfig(
            r=rank, lora_alpha=int(SCALE * rank), lora_dropout=0.0, target_modules=targets, fan_in_fan_out=gpt
        )
        adapted: nn.Module = peft.get_peft_model(backbone, asked)
        return adapted
    asked = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=rank)
    prompted: nn.Module = peft.get_peft_model(backbone, asked)
    return prompted


@lru_cache(maxsize=2)
def pretrained(model: str, vocabulary: int, length: int, seed: int = 0) -> Any:
    """The backbone of that name, frozen and without drop-out; one a process. Random weights are those of `seed`."""
    transformers = library("transformers")
    name, _, options = model.partition(":")
    if name == "gpt2" and options and not Path(model).exists():
        width, layers = (int(number) for number in options.split(","))
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        with seeded(seed, "model", "backbone"):  # frozen weights never travel: every process draws the same
            return transformers.GPT2Model(config)
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        for drop in (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "dropout",
        ):
            if hasattr(config, drop):
                setattr(config, drop, 0.0)
        return transformers.AutoModel.from_pretrained(model, config=config).float()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load the model {model!r}: {str(error).splitlines()[0]}; give a folder or a hub name"
        ) from None


def tokenised(model: str) -> tuple[Callable[[list[str], list[str]], tuple[Tensor, Tensor, tuple[str, ...]]], int]:
    """How the model's tokenizer encodes training and test texts, and its padding token."""
    tokenizer = library("transformers").AutoTokenizer.from_pretrained(model)
    padding = int(tokenizer.pad_token_id or 0)

    def encode(train: list[str], test: list[str]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        rows = [tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"] for texts in (train, test)]
        length = max(map(len, rows[0]))

        def padded(split: list[list[int]]) -> Tensor:
            out = torch.full((len(split), length), padding, dtype=torch.int64)
            for line, row in zip(out, split, strict=True):
                line[: min(len(row), length)] = torch.tensor(row[:length])
            return out

        return padded(rows[0]), padded(rows[1]), tuple(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))

    return encode, padding


def library(name: str) -> Any:
    """A library of the extra, or one line that says how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"fine-tuning needs {name}: pip install 'manyhands[llm]'") from None


def build(spec: Spec, kind: str = "lora", rank: int = 8) -> Finetune:
    """The task of a run's settings: `finetune:lora,rank=8` with `model=FOLDER`."""
    if kind not in KINDS:
        raise unknown("way of fine-tuning", kind, KINDS)
    if spec.model is None:
        raise UsageError("fine-tuning needs a pretrained model: model=FOLDER, a name of the hub, or gpt2:64,2")
    natural = natural_columns(spec.partition)
    causal = spec.model.startswith("gpt2:")
    if causal:
        source, padding = load(spec.data, spec.label, spec.seed, exclude=natural), 0
    else:
        encode, padding = tokenised(spec.model)
        source = load(spec.data, spec.label, spec.seed, exclude=natural, encode=encode)
        if source.vocabulary[:2] == (PADDING, UNKNOWN):  # read as characters, past the tokenizer
            raise UsageError(f"{spec.data} is plain text, read by characters; take model=gpt2:64,2, not {spec.model}")
    if source.kind != "text":
        raise UsageError(f"fine-tuning reads text; {spec.data} is {source.kind} data")
    clients = spec.clients or (None if natural else 20)
    federation = federate(source, spec.partition, clients, spec.validation, spec.seed, spec.public)
    made = (CausalModel if causal else Finetune)(federation, spec.model, kind, rank, padding, spec.seed)
    made.network()  # a model that does not fit is told now
    return made


class LoraToy(Toy):
    """Toy's clouds of points for a frozen network with low-rank adapters, after which a small head is trained."""

    offers = frozenset({"public", "finetune"})

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
