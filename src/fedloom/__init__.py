"""Federated learning in which every algorithm is one short file that runs unchanged from a notebook to a cluster."""

import importlib
from typing import TYPE_CHECKING

from fedloom._version import __version__

if TYPE_CHECKING:
    from fedloom.api import compare as compare
    from fedloom.api import problem as problem
    from fedloom.api import resume as resume
    from fedloom.api import run as run
    from fedloom.api import sweep as sweep
    from fedloom.cohort import ByGroup as ByGroup
    from fedloom.cohort import Cohort as Cohort
    from fedloom.cohort import Each as Each
    from fedloom.cohort import Mean as Mean
    from fedloom.cohort import Once as Once
    from fedloom.cohort import Replies as Replies
    from fedloom.cohort import Reply as Reply
    from fedloom.comparison.results import Results as Results
    from fedloom.errors import CodecError as CodecError
    from fedloom.errors import RunError as RunError
    from fedloom.errors import UsageError as UsageError
    from fedloom.message import Packed as Packed
    from fedloom.message import Seed as Seed
    from fedloom.message import Sparse as Sparse
    from fedloom.method import Method as Method
    from fedloom.method import client as client
    from fedloom.node import Client as Client
    from fedloom.node import Server as Server
    from fedloom.runs.record import Run as Run
    from fedloom.runs.spec import Spec as Spec
    from fedloom.task import Batch as Batch
    from fedloom.task import Data as Data
    from fedloom.task import Task as Task
    from fedloom.tasks.classification import Classification as Classification
    from fedloom.vector import Layout as Layout
    from fedloom.vector import Vector as Vector
    from fedloom.world import World as World


_HOMES = {
    "api": ("compare", "problem", "resume", "run", "sweep"),
    "cohort": ("ByGroup", "Cohort", "Each", "Mean", "Once", "Replies", "Reply"),
    "comparison.results": ("Results",),
    "errors": ("CodecError", "RunError", "UsageError"),
    "message": ("Packed", "Seed", "Sparse"),
    "method": ("Method", "client"),
    "node": ("Client", "Server"),
    "runs.record": ("Run",),
    "runs.spec": ("Spec",),
    "task": ("Batch", "Data", "Task"),
    "tasks.classification": ("Classification",),
    "vector": ("Layout", "Vector"),
    "world": ("World",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> object:
    # Names are loaded when they are first used: `import fedloom` and `fedloom --help` never wait for torch.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fedloom.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
