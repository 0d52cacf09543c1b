"""The blocks of a network's body, its stages, and the network that has only the first of them."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import fedloom
from fedloom import nets, tasks
from fedloom.errors import UsageError
from fedloom.nets.depth import blocks, depth, shallower, stages
from fedloom.random import seeded
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout

IMAGE = (3, 8, 8)


def fresh(name, shape=IMAGE):
    with seeded(0, "model", "init"):
        return nets.build(name, shape, 5)


def test_the_blocks_of_a_residual_network_and_its_stages():
    assert blocks(fresh("resnet:2")) == [
        ("conv", "norm", "relu"),
        *[(f"stage{s}_block{b}",) for s in (1, 2) for b in (1, 2)],
        ("stage3_block1",),
        ("stage3_block2", "pool", "flatten"),
    ]
    of_stages = stages(fresh("resnet:3"))
    assert [len(stage) for stage in of_stages] == [1, 3, 3, 3]
    assert [stage[0] for stage in of_stages[1:]] == [(f"stage{s}_block1",) for s in (1, 2, 3)]
    assert of_stages[3][2] == ("stage3_block3",), "pooling is not the last block's own"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", []),
        ("mlp:7", ["1"]),
        ("mlp:7,7,7", ["123"]),
        ("mlp:7,7,5,5,7", ["12", "34", "5"]),
    ],
)
def test_the_stages_of_chains(name, expected):
    found = [[f"fc{n}", f"relu{n}"] for stage in expected for n in stage]
    sizes = [len(stage) for stage in expected]
    net = fresh(name)
    of_stages = stages(net)
    assert [list(block[-2:]) for stage in of_stages for block in stage] == found
    assert [len(stage) for stage in of_stages] == sizes and depth(net) == max(sizes, default=0)
    assert not of_stages or of_stages[0][0][0] == "0", "flattening comes first"


def test_a_network_of_other_layers_only_has_stages_of_one_block():
    assert {len(stage) for stage in stages(fresh("cnn", (3, 16, 16)))} == {1}
    assert depth(fresh("cnn", (3, 16, 16))) == 1


def test_blocks_of_one_shape_that_is_not_square_are_one_stage_and_those_of_other_classes_are_not():
    def layer(kind=nn.TransformerEncoderLayer):
        return kind(8, 2, 16)

    alike = nn.Module()
    alike.body = nn.Sequential(
        OrderedDict(a=layer(), b=layer(), c=layer(nn.TransformerDecoderLayer), d=nn.Linear(8, 8))
    )
    assert stages(alike) == [[("a",), ("b",)], [("c",)], [("d",)]]


def test_a_body_that_is_no_chain_has_no_blocks():
    with seeded(0, "model", "init"):
        net = nets.build("transformer:8,2", (12,), 5, 30)
    assert blocks(net) == stages(net) == [] and depth(net) == 0
    assert blocks(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("kept", [1, 2])
def test_a_shallower_network_is_the_whole_one_without_the_blocks_behind(kept):
    whole, x = fresh("resnet:3").eval(), torch.randn(2, *IMAGE)
    out = x
    for name, child in whole.body.named_children():
        if not name.startswith("stage") or int(name[-1]) <= kept:
            out = child(out)
    expected, before = whole.head(out), Layout.of(whole)
    found = shallower(whole, kept)
    assert torch.equal(found(x), expected)
    assert set(Layout.of(found).names) < set(before.names)
    assert not any(f"block{kept + 1}" in name for name in Layout.of(found).names)


def test_a_block_is_left_out_with_what_belongs_to_it():
    assert [name for name, _ in shallower(fresh("mlp:7,7,7"), 1).body.named_children()] == ["0", "fc1", "relu1"]
    assert [name for name, _ in shallower(fresh("resnet:2"), 1).body.named_children()][-3:] == [
        *("stage3_block1", "pool", "flatten")
    ]


def test_as_many_blocks_as_there_are_change_nothing_and_none_is_refused():
    whole = fresh("resnet:2")
    body = whole.body
    assert shallower(whole, 2).body is body and shallower(whole, 9).body is body
    with pytest.raises(UsageError, match="a network of 0 blocks a stage; it has at least 1"):
        shallower(whole, 0)


def test_a_problem_offers_blocks_if_its_network_has_several():
    assert "blocks" in Toy(blocks=2).offers and "blocks" not in Toy().offers
    assert tasks.build(Spec(clients=4, model="mlp:8,4")).offers == {"blocks"}
    with pytest.raises(UsageError, match="inco needs a network with several blocks: set model=resnet:3, or"):
        fedloom.run("inco", clients=4, rounds=1)


def test_the_toys_blocks_are_residual():
    with seeded(0, "model", "init"):
        net = Toy(blocks=2).network()
    x = torch.randn(3, 6)
    out = net.body[1](net.body[0](x))
    for block in (net.body[2], net.body[3]):
        weight, bias = block.layers[0].weight, block.layers[0].bias
        out = out + (out @ weight.T + bias).relu()
    torch.testing.assert_close(net(x), out @ net.head.weight.T + net.head.bias)
