"""Networks that take any numbers: the input is flattened, so images lose their neighbourhoods."""

from math import prod

from torch import nn

from fedloom.nets.net import Net, widths


def linear(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """Multinomial logistic regression."""
    return perceptron([], shape, classes)


def mlp(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """Hidden layers with ReLU, of the widths given: `mlp:128,64`; one of 64 where none is given."""
    return perceptron(widths("mlp:WIDTH,...", options, default=(64,)), shape, classes)


def dnn(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """PFLlib's `DNN`: one hidden layer of 100. Its closing log-softmax is left to the loss, which then is the same."""
    return perceptron([100], shape, classes)


def perceptron(hidden: list[int], shape: tuple[int, ...], classes: int) -> Net:
    """Flatten, then a Linear and a ReLU for each hidden width; the head is one Linear."""
    body = nn.Sequential(nn.Flatten())
    width = prod(shape)
    for number, wider in enumerate(hidden, start=1):
        body.add_module(f"fc{number}", nn.Linear(width, wider))
        body.add_module(f"relu{number}", nn.ReLU())
        width = wider
    return Net(body, nn.Linear(width, classes))
