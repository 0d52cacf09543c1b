"""Pretrained language models: where they come from, their tokenizers, and which part of them is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom.data.text import Encode, Reading
from fedloom.errors import UsageError
from fedloom.nets.adapters import SCALE
from fedloom.random import seeded

KINDS = ("lora", "prompt", "bias", "head", "full")
WHERE = "give a folder, a hub name, package:NAME, or gpt2:WIDTH,LAYERS for random weights"
DROPS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("dropout", "attention_dropout", "activation_dropout"),
)


class Backbone(NamedTuple):
    """A pretrained model: what makes states [B, L, D] of tokens [B, L], and a language model's own head.

    `causal`: a state has seen what stands before it only.
    """

    body: Any
    head: nn.Linear | None
    causal: bool


class Body(nn.Module):
    """Features [B, D] of tokens [B, L]: the mean of the states of what is no padding, or the last one if causal."""

    def __init__(self, encoder: nn.Module, padding: int, causal: bool, prompts: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.prompts: Any = prompts  # virtual tokens before every text
        self.padding, self.causal = padding, causal

    def states(self, x: Tensor) -> Tensor:
        """The last hidden states [B, L, D]; those of virtual tokens are left out."""
        mask = (x != self.padding).long()
        if self.prompts is None:
            out: Tensor = self.encoder(input_ids=x, attention_mask=mask).last_hidden_state
            return out
        count: int = self.prompts.embedding.num_embeddings
        virtual = self.prompts(torch.arange(count, device=x.device)).expand(len(x), -1, -1)
        given = torch.cat([virtual, self.encoder.get_input_embeddings()(x)], 1)
        mask = torch.cat([mask.new_ones(len(x), count), mask], 1)
        prompted: Tensor = self.encoder(inputs_embeds=given, attention_mask=mask).last_hidden_state
        return prompted[:, count:]

    def forward(self, x: Tensor) -> Tensor:
        states, mask = self.states(x), x != self.padding
        if self.causal:
            last = mask.sum(1).clamp(min=1) - 1
            return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
        weight = mask.unsqueeze(2).to(states)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


class Tuned(nn.Module):
    """`head(body(x))`, as every network."""

    def __init__(self, body: Body, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def parts(self) -> dict[str, nn.Module]:
        """What runs one after the other."""
        return {"body": self.body, "head": self.head}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def tuned(backbone: Backbone, kind: str, rank: int, padding: int, classes: int) -> Tuned:
    """A network on a backbone, of which `kind` says what is trained; frozen weights are shared by all copies.

    `classes`: outputs of the fresh head that is put on a backbone without its own.
    """
    frozen = {id(p): p for part in backbone[:2] if part is not None for p in part.parameters()}
    body, head = copy.deepcopy(backbone[:2], {} if kind == "full" else frozen)
    prompts = None
    if kind == "full":
        for part in (body, head):
            if part is not None:
                part.requires_grad_(True)
    elif kind == "bias":
        for name, param in list(body.named_parameters()):
            if name.endswith("bias"):
                owner = body.get_submodule(name.rpartition(".")[0])
                setattr(owner, "bias", nn.Parameter(param.detach().clone()))  # noqa: B010 - not the shared one
    elif kind == "lora":
        family = body.config.model_type
        gpt = family == "gpt2"  # whose weights lie the other way round
        targets = {"gpt2": ["c_attn"], "bert": ["query", "value"]}.get(family)  # None: PEFT's own choice
        asked = library("peft").LoraConfig(
            r=rank,
            lora_alpha=int(SCALE * rank),
            lora_dropout=0.0,
            target_modules=targets,
            fan_in_fan_out=gpt,
        )
        # Not `get_peft_model`: its wrapper asks for what transformers has deprecated, and nothing here needs it.
        body = library("peft").inject_adapter_in_model(asked, body)
    elif kind == "prompt":
        peft = library("peft")
        asked = peft.PromptTuningConfig(
            task_type="FEATURE_EXTRACTION",
            num_virtual_tokens=rank,
            token_dim=body.get_input_embeddings().embedding_dim,
            num_transformer_submodules=1,
        )
        prompts = peft.PromptEmbedding(asked, body.get_input_embeddings())
    if head is None:
        head = nn.Linear(body.config.hidden_size, classes)
    return Tuned(Body(body, padding, backbone.causal, prompts), head)


@lru_cache(maxsize=2)
def pretrained(
    model: str, vocabulary: int, length: int, seed: int = 0, speaking: bool = False, layers: int = 0
) -> Backbone:
    """The model of that name, frozen and without drop-out; one a process.

    `speaking`: with its own head, of a causal language model. `layers`: only so many, the first ones; 0 for all. Texts
    are `length` tokens long. Random weights
    (`gpt2:WIDTH,LAYERS`, for so many tokens of a `vocabulary`) are those of `seed`, and have no head.
    """
    transformers = library("transformers")
    if (size := random_size(model)) is not None:
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=length, n_embd=size[0], n_layer=size[1], n_head=4, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        with seeded(seed, "model", "backbone"):  # frozen weights never travel: every process draws the same
            return Backbone(transformers.GPT2Model(config).requires_grad_(False), None, True)
    folder = located(model)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        for drop in DROPS:
            if hasattr(config, drop):
                setattr(config, drop, 0.0)
        config.use_cache = False
        if layers > config.num_hidden_layers:
            raise UsageError(f"{model} has {config.num_hidden_layers} layers, not {layers}")
        config.num_hidden_layers = layers or config.num_hidden_layers
        causal = _causal(config.model_type)
        if speaking and not causal:
            raise UsageError(
                f"{model} ({config.model_type}) is an encoder and cannot continue a plain text; "
                "take a causal model, such as gpt2:64,2"
            )
        kind = transformers.AutoModelForCausalLM if speaking else transformers.AutoModel
        found = kind.from_pretrained(folder, config=config).float().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the model {model!r}: {str(error).splitlines()[0]}; {WHERE}") from None
    places = getattr(config, "max_position_embeddings", None)
    if places is not None and length > places:
        raise UsageError(f"{model} takes {places} tokens at most, and these texts have {length}; set length={places}")
    return Backbone(*_body_and_head(model, found), causal) if speaking else Backbone(found, None, causal)


def random_size(model: str) -> tuple[int, int] | None:
    """Width and layers of `gpt2:WIDTH,LAYERS`, a causal model with random weights; None for any other name."""
    name, colon, options = model.partition(":")
    if name != "gpt2" or not colon or Path(model).exists():
        return None
    try:
        width, layers = (int(number) for number in options.split(","))
    except ValueError:
        raise UsageError(f"model={model}; expected gpt2:WIDTH,LAYERS, such as gpt2:64,2") from None
    if width < 4 or width % 4 or layers < 1:
        raise UsageError(f"model={model}; a width that 4 heads can share is needed, and a layer, as in gpt2:64,2")
    return width, layers


def located(model: str) -> str:
    """The folder of the model that an installed package ships (`package:NAME`); any other name as it is."""
    kind, _, name = model.partition(":")
    if kind != "package" or Path(model).exists():
        return model
    from importlib.metadata import PackageNotFoundError, files

    try:
        shipped = files(name) or []
    except (PackageNotFoundError, ValueError):
        raise UsageError(f"model={model}: no package {name!r} is installed here; pip install it") from None
    folders = {Path(str(file.locate())).parent for file in shipped if file.name == "config.json"}
    found = sorted((f for f in folders if any(f.glob("*.safetensors"))), key=lambda f: (len(f.parts), f))
    if not found:
        raise UsageError(f"the package {name!r} ships no model: no folder in it has a config.json and .safetensors")
    return str(found[0])


def tokenised(model: str, length: int) -> tuple[Encode, int, Callable[[int], Reading]]:
    """How the model's tokenizer encodes texts of up to `length` tokens, its padding token, and how it reads plain text.

    The last is a function of the window's length in tokens.
    """
    try:
        tokenizer = library("transformers").AutoTokenizer.from_pretrained(located(model))
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer in {model!r}: {str(error).splitlines()[0]}; {WHERE}") from None
    marks = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # GPT-2 has no token for padding
    padding = next(int(mark) for mark in marks if mark is not None)
    vocabulary = tuple(map(str, tokenizer.convert_ids_to_tokens(range(len(tokenizer)))))

    def encode(train: list[str], test: list[str]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        rows = [tokenizer(texts, truncation=True, max_length=length)["input_ids"] for texts in (train, test)]
        longest = max(1, *map(len, rows[0]))

        def padded(split: list[list[int]]) -> Tensor:
            out = torch.full((len(split), longest), padding, dtype=torch.int64)
            for line, row in zip(out, split, strict=True):
                line[: min(len(row), longest)] = torch.tensor(row[:longest], dtype=torch.int64)
            return out

        return padded(rows[0]), padded(rows[1]), vocabulary

    def spell(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode, padding, lambda window: Reading(window, window, spell, vocabulary)


def library(name: str) -> Any:
    """A library of the extra, or one line that says how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"a pretrained language model needs {name}: pip install 'fedloom[llm]'") from None


def _causal(family: str) -> bool:
    """Whether models of a family see what stands before a token only: they speak, and fill no gaps."""
    known = library("transformers.models.auto.modeling_auto")
    return family in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _body_and_head(model: str, speaker: Any) -> tuple[Any, nn.Linear]:
    """The two parts of a language model, provided that there is nothing else in it."""
    body, head = speaker.base_model, speaker.get_output_embeddings()
    x = torch.arange(3)[None]
    if body is not speaker and isinstance(head, nn.Linear):
        with torch.no_grad():
            whole, parts = speaker(input_ids=x).logits, head(body(input_ids=x).last_hidden_state)
        if whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-3, atol=1e-4):
            return body, head
    raise UsageError(f"{model} does more than head(body(x)) with its states; take a model such as gpt2 or llama")
