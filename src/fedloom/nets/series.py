"""Networks that read windows [B, T, C]: T rows of a series one after another, of C numbers each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedloom.nets.net import HEADS, Net, widths


def gru(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """Gated recurrent units, 64 in one layer, of which the last state is judged: `gru:HIDDEN,LAYERS`."""
    hidden, layers = widths("gru:HIDDEN,LAYERS", options, default=(64, 1), most=2)
    return Net(Recurrent(nn.GRU(shape[1], hidden, layers, batch_first=True)), nn.Linear(hidden, classes))


def lstm(hidden: int, shape: tuple[int, ...], classes: int) -> Net:
    """Two LSTM layers, as on texts."""
    return Net(Recurrent(nn.LSTM(shape[1], hidden, 2, batch_first=True)), nn.Linear(hidden, classes))


def transformer(width: int, layers: int, shape: tuple[int, ...], classes: int) -> Net:
    """A pre-norm encoder with learned positions, as on texts."""
    return Net(Attending(shape[0], shape[1], width, layers), nn.Linear(width, classes))


class Recurrent(nn.Module):
    """Reads a window from its first row to its last."""

    def __init__(self, layers: nn.RNNBase) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Windows [B, T, C] to the state [B, hidden] after the last row."""
        states: Tensor = self.layers(x)[0]
        return states[:, -1]


class Attending(nn.Module):
    """Self-attention over the rows of a window."""

    def __init__(self, length: int, channels: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(channels, width)
        self.position = nn.Embedding(length, width)
        # Not nn.TransformerEncoder, which copies one layer: all of them would start from the same weights.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Windows [B, T, C] to the mean state [B, width] over their rows."""
        states = self.embedding(x) + self.position.weight[: x.shape[1]]
        for layer in self.layers:
            states = layer(states)
        return torch.mean(self.norm(states), 1)
