"""What a run's folder hands out of the model that was trained: networks of plain PyTorch, predictions, other forms."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.runs.folder import Folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedloom.data.given import Given
    from fedloom.runs.confusion import Confusion
    from fedloom.task import Task
    from fedloom.vector import Vector


class Learned(Folder):
    """A run's folder, of which the part `model/` is what was learned."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.forms: dict[str, nn.Module] = {}  # networks that no recipe builds, where this process trained them
        self.given: Task | Given | None = None  # the problem, where this process was given it in Python

    @property
    def model(self) -> Vector:
        """What was learned of the global model's last round, by the names of its network; `module` is the whole."""
        from fedloom.runs.trained import Trained

        return Trained(self.path).vector()

    def module(self, which: str = "chosen", into: nn.Module | None = None) -> nn.Module:
        """The trained network, a plain `nn.Module` in evaluation mode: of the round that validation chose, or `last`.

        `into` is a network of the same form that takes the weights: for the folder of a run on a task given in Python,
        whose network no recipe builds. Raises UsageError where there is no such model.

        Examples:
            >>> run = fedloom.run("fedavg", rounds=1, clients=4)
            >>> run.module()(torch.zeros(2, 1, 8, 8)).shape
            torch.Size([2, 10])
        """
        from fedloom.runs.trained import Trained

        return Trained(self.path, self.forms).module(which, into)

    def client_module(self, client: int, which: str = "chosen", into: nn.Module | None = None) -> nn.Module:
        """The network that a client would use: its personal one, or the global one where the method makes no others.

        As `module` else. Raises UsageError where the method makes of a client's models something that is no network.

        Examples:
            >>> run = fedloom.run("ditto", rounds=1, clients=4)
            >>> run.client_module(3)(torch.zeros(2, 1, 8, 8)).shape
            torch.Size([2, 10])
        """
        from fedloom.runs.trained import Trained

        return Trained(self.path, self.forms).client_module(client, which, into)

    def predict(
        self, x: Any, client: int | None = None, *, which: str = "chosen", probabilities: bool = False
    ) -> list[Any]:
        """What the trained network says of raw rows: names of classes, amounts, or lists of labels, one a row.

        `x` is a table (a DataFrame, a list of dicts, columns by name, a .csv or .parquet file), an array, images or a
        folder of them, or texts. They are read, scaled and encoded as the training rows were. With a `client`, it is
        the network that this client would use. With `probabilities`, each is a dict of them by class. Where rows are of
        several series of windows, a row that too few of its series precede has None. What is to be
        told of the rows (categories that training did not see) is a warning; rows that the network has not learned to
        read raise UsageError.

        Examples:
            >>> run = fedloom.run("fedavg", rounds=2, clients=4)
            >>> len(run.predict(torch.zeros(3, 8, 8)))
            3
        """
        from fedloom.runs.trained import Trained

        found, told = Trained(self.path, self.forms).predict(x, client, which, probabilities)
        for line in told:
            warnings.warn(line, stacklevel=2)
        return found

    def confusion(
        self: Any,
        client: int | str | None = None,
        split: str = "test",
        *,
        which: str = "chosen",
        task: Task | Any = None,
    ) -> Confusion:
        """Which classes the trained network takes for which: of the global model on the global test.

        With a `client`, it is the network that this client would use, on its rows of the split: `train`, `validation`
        or `test`; with "all", that of all clients that were judged, each on its own rows. Without a client, the other
        splits are those of all clients together. Data are read again for what the record does not have; where only
        Python has them, `task` gives them again, as in `resume`. Raises UsageError where there is no such network, no
        classes, or where the data changed.

        Examples:
            >>> run = fedloom.run("fedavg", rounds=2, clients=4)
            >>> found = run.confusion()
            >>> found.matrix.shape, len(found) == len(run.confusion(split="test", which="last"))
            ((10, 10), True)
            >>> right = found.matrix.trace() / len(found)
            >>> right == run.selected["global_test_accuracy"]
            True
        """
        from fedloom.runs.counting import confusion

        return confusion(self, client, split, which, task)

    def export(
        self,
        to: str,
        out: str | Path | None = None,
        client: int | None = None,
        *,
        which: str = "chosen",
        example: Tensor | None = None,
    ) -> Path:
        """Writes the trained network for other programs, and gives the path: `torchscript`, `torch-export`, `onnx`, or
        the folder of an adapter for `peft`; by default into `model/`.

        `example` are inputs [N, ...] of at least two rows, for a network that was made in Python. What is written was
        loaded and compared with the network. Raises UsageError for what it cannot be exported to.
        """
        from fedloom.runs.trained import Trained

        return Trained(self.path, self.forms).export(to, Path(out) if out else None, client, which, example)
