"""Adam beside torch's own."""

import pytest
import torch
from torch import nn

from fedloom import encoding
from fedloom.ops.adam import Adam
from fedloom.vector import Vector


@pytest.mark.parametrize("length", [1.0, 1e-8])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_torchs(decay, length):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    w, moments = Vector.of(net), {}
    ours = Adam(lr=0.05, betas=(0.8, 0.95), weight_decay=decay)
    theirs = torch.optim.Adam(net.parameters(), lr=0.05, betas=(0.8, 0.95), weight_decay=decay)
    statistics = w.buffers.flat.clone()
    for step in range(6):
        draw = torch.randn(len(w), generator=torch.Generator().manual_seed(step))
        g = Vector(length * draw, w.layout)
        for name, param in net.named_parameters():
            param.grad = g[name].clone()
        theirs.step()
        w, moments = ours.step(w, g.merge(g.buffers.zeros_like()), moments)
    torch.testing.assert_close(w.params.flat, Vector.of(net).params.flat)
    assert torch.equal(w.buffers.flat, statistics) and moments["steps"] == 6
    encoding.check(moments, "moments")
