"""Federated learning: an algorithm is one short file, and runs unchanged from a notebook to a fleet."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from manyhands.cohort import Cohort as Cohort
    from manyhands.cohort import Each as Each
    from manyhands.cohort import Mean as Mean
    from manyhands.cohort import Replies as Replies
    from manyhands.cohort import Reply as Reply
    from manyhands.comparison.results import Results as Results
    from manyhands.comparison.run import compare as compare
    from manyhands.comparison.sweep import sweep as sweep
    from manyhands.errors import CodecError as CodecError
    from manyhands.errors import RunError as RunError
    from manyhands.errors import UsageError as UsageError
    from manyhands.experiment import resume as resume
    from manyhands.experiment import run as run
    from manyhands.message import Packed as Packed
    from manyhands.message import Seed as Seed
    from manyhands.message import Sparse as Sparse
    from manyhands.method import Method as Method
    from manyhands.method import client as client
    from manyhands.node import Client as Client
    from manyhands.node import Server as Server
    from manyhands.record import Run as Run
    from manyhands.spec import Spec as Spec
    from manyhands.task import Batch as Batch
    from manyhands.task import Data as Data
    from manyhands.task import Task as Task
    from manyhands.tasks.classification import Classification as Classification
    from manyhands.vector import Layout as Layout
    from manyhands.vector import Vector as Vector
    from manyhands.world import World as World


_HOMES = {
    "cohort": ("Cohort", "Each", "Mean", "Replies", "Reply"),
    "comparison.results": ("Results",),
    "comparison.run": ("compare",),
    "comparison.sweep": ("sweep",),
    "errors": ("CodecError", "RunError", "UsageError"),
    "message": ("Packed", "Seed", "Sparse"),
    "method": ("Method", "client"),
    "node": ("Client", "Server"),
    "record": ("Run",),
    "experiment": ("resume", "run"),
    "spec": ("Spec",),
    "task": ("Batch", "Data", "Task"),
    "tasks.classification": ("Classification",),
    "vector": ("Layout", "Vector"),
    "world": ("World",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> object:
    # Names are loaded when they are first used: `import manyhands` and `manyhands --help` never wait for torch.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'manyhands' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"manyhands.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
