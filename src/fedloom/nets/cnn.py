"""Plain convolutional networks for small images [C, H, W].

Pooling stands before ReLU: the two commute, values and gradients alike, and ReLU then has a quarter of the work.
"""

from collections import OrderedDict

from torch import nn

from fedloom.nets.net import Net, check_size, widths


def cnn(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """McMahan et al.'s CNN as PFLlib's `FedAvgCNN` has it: 5x5 convolutions of 32 and 64 without padding, 512 hidden.

    Other widths are asked for as `cnn:16,32,128`.
    28x28x1 with 10 classes has 582,026 parameters (1,663,370 in the paper, which pads); 32x32x3 has 878,538.
    """
    check_size("cnn", shape, 16, "mlp:64 or resnet8")
    channels, height, width = shape
    first, second, hidden = widths("cnn:MAPS,MAPS,HIDDEN", options, default=(32, 64, 512), most=3)
    layers = _maps(channels, first, second) | OrderedDict(
        fc1=nn.Linear(second * side_left(height) * side_left(width), hidden),
        relu3=nn.ReLU(),
    )
    return Net(nn.Sequential(layers), nn.Linear(hidden, classes))


def lenet(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling for its sigmoids and sub-sampling, every map connected.

    It was drawn for 32x32: images with a side below 32 get a border of two pixels, as MNIST's 28x28 did there.
    28x28x1 with 10 classes has 61,706 parameters, 32x32x3 has 62,006. Other widths: `lenet:12,32,240,84`.
    """
    check_size("lenet", shape, 12, "mlp:64 or resnet8")
    channels, height, width = shape
    border = 2 if min(height, width) < 32 else 0
    first, second, *hidden = widths("lenet:MAPS,MAPS,HIDDEN,HIDDEN", options, default=(6, 16, 120, 84), most=4)
    places = side_left(height + 2 * border) * side_left(width + 2 * border)
    layers = _maps(channels, first, second, border) | OrderedDict(
        fc1=nn.Linear(second * places, hidden[0]),
        relu3=nn.ReLU(),
        fc2=nn.Linear(hidden[0], hidden[1]),
        relu4=nn.ReLU(),
    )
    return Net(nn.Sequential(layers), nn.Linear(hidden[1], classes))


def _maps(channels: int, first: int, second: int, border: int = 0) -> OrderedDict[str, nn.Module]:
    """The two convolutions, with what stands behind each, and all their maps in one row."""
    return OrderedDict(
        conv1=nn.Conv2d(channels, first, 5, padding=border),
        pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(first, second, 5),
        pool2=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
    )


def side_left(side: int) -> int:
    """Pixels left of a side after two rounds of a 5x5 convolution without padding and a 2x2 pooling."""
    return ((side - 4) // 2 - 4) // 2
