"""A problem of your own: regression across hospitals whose measurements have different offsets.

    python examples/own_task.py

A task is data, a network with a body and a head, and a loss. The task defines what `accuracy` means; here it is the
fraction of predictions within half a unit of the truth.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedloom
from fedloom import Batch, Data, Task


class Net(nn.Module):
    """Two layers: a body that is shared in personalised methods, and a head that they may keep."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Hospitals(Task):
    """Eight hospitals with 60 patients for training, 20 for validation and 20 for the test."""

    population, classes, each = 8, 0, 100

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(self.population * self.each, 4, generator=draw)
        offset = torch.linspace(-1, 1, self.population).repeat_interleave(self.each)
        self.y = self.x.sum(1) + offset + 0.1 * torch.randn(len(self.x), generator=draw)

    def network(self) -> nn.Module:
        return Net()

    def data(self, client: int, split: str) -> Data:
        first, last = {"train": (0, 60), "validation": (60, 80), "test": (80, 100)}[split]
        return Data(self.x, self.y, client * self.each + torch.arange(first, last))

    def global_test(self) -> Data:
        rows = torch.arange(len(self.x)).view(self.population, self.each)
        return Data(self.x, self.y, rows[:, 80:].flatten())

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(outputs.squeeze(1), batch.y)

    def judge(self, scores, data: Data) -> dict[str, float]:
        error = scores(data.x).squeeze(1) - data.y
        near = (error.abs() < 0.5).double().mean().item()
        return {"n": len(data), "loss": error.square().mean().item(), "accuracy": near}

    def to(self, device: torch.device) -> "Hospitals":
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


def main() -> None:
    for method in ("fedavg", "ditto", "local"):
        final = fedloom.run(method, Hospitals(), rounds=30).final
        near, worst = final["personal_test_accuracy"], final["worst_client_accuracy"]
        print(f"{method:7} within half a unit: {near:.2f}, worst {worst:.2f}")


if __name__ == "__main__":
    main()
