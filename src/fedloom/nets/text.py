"""Networks that read tokens [B, L], int64 from 0 to vocabulary - 1, where token 0 is padding and says nothing."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError
from fedloom.nets import series
from fedloom.nets.net import HEADS, Net, widths

PADDING = 0


def lstm(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """The Shakespeare model of LEAF and FedProx: embedding 8, two LSTM layers of 256 (`lstm:HIDDEN`).

    80 tokens and 80 classes have 819,920 parameters: 2,048 more than in TensorFlow, as torch's LSTM has two biases.
    """
    (hidden,) = widths("lstm:HIDDEN", options, default=(256,), most=1)
    if not vocabulary:
        return series.lstm(hidden, shape, classes)
    return Net(Recurrent(vocabulary, 8, hidden), nn.Linear(hidden, classes))


def transformer(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """A small pre-norm encoder with learned positions and four attention heads: `transformer:WIDTH,LAYERS` (64,2)."""
    width, layers = widths("transformer:WIDTH,LAYERS", options, default=(64, 2), most=2)
    if width % HEADS:
        raise UsageError(
            f"model 'transformer:{options}' has {HEADS} attention heads, which do not divide its width {width}; "
            f"take a multiple of {HEADS}"
        )
    if not vocabulary:
        return series.transformer(width, layers, shape, classes)
    return Net(Encoder(vocabulary, shape[0], width, layers), nn.Linear(width, classes))


class Recurrent(nn.Module):
    """Two stacked LSTM layers that read a row of tokens from left to right."""

    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] to the state [B, hidden] after the last one that is not padding."""
        states: Tensor = self.lstm(self.embedding(tokens))[0]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (places * (tokens != PADDING)).amax(dim=1)
        return states[torch.arange(len(tokens), device=tokens.device), last]


class Encoder(nn.Module):
    """Self-attention over a row of at most `length` tokens.

    Without dropout: the networks of a federation's clients are small, and shall not depend on one more random stream.
    """

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.position = nn.Embedding(length, width)
        # Not nn.TransformerEncoder, which copies one layer: all of them would start from the same weights.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def parts(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What runs one after the other. States [B, L, width] between them are zero where there is padding."""
        layers = {f"layers.{place}": partial(self.attend, layer) for place, layer in enumerate(self.layers)}
        return {"embedding": self.embed, **layers, "norm": self.mean}

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] to their mean [B, width], padding left out; zero for a row of nothing but padding."""
        x = tokens
        for part in self.parts().values():
            x = part(x)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] and their places."""
        x: Tensor = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        return x * (tokens != PADDING).unsqueeze(2)

    def attend(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What a layer makes of states."""
        words = (x != 0).any(2)
        # Softmax over nothing is NaN, so an empty row attends to its padding; the mean leaves it out again.
        masked = ~words & words.any(dim=1, keepdim=True)
        attended: Tensor = layer(x, src_key_padding_mask=masked)
        return attended * words.unsqueeze(2)

    def mean(self, x: Tensor) -> Tensor:
        """The mean state [B, width] of what is no padding."""
        words = (x != 0).any(2)
        share = words / words.sum(dim=1, keepdim=True).clamp(min=1)
        mean: Tensor = (self.norm(x) * share.unsqueeze(2)).sum(dim=1)
        return mean
