"""Federated learning in which every algorithm is one short file that runs unchanged from a notebook to a cluster."""

import importlib.util

from fedloom._version import __version__

_HOMES = {
    "api": ("compare", "find_runs", "load", "problem", "resume", "rounds", "run", "sweep"),
    "cohort": ("ByGroup", "Cohort", "Each", "Mean", "Once", "Replies", "Reply"),
    "errors": ("CodecError", "RunError", "UsageError"),
    "message": ("Packed", "Seed", "Sparse"),
    "method": ("Method", "client"),
    "node": ("Client", "Server"),
    "report.results": ("Results",),
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
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"fedloom.{_HOME_OF[name]}"), name)
    else:
        value = _method(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from fedloom.registry import class_names

    return sorted({*globals(), *__all__, *class_names()})


def _method(name: str) -> object:
    """The class of a method: `fedloom.FedProx`."""
    lacking = f"module 'fedloom' has no attribute {name!r}"
    # `from fedloom import errors` asks here first, before that module and those that it imports are there.
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}"):
        raise AttributeError(lacking)
    from fedloom.errors import nearest
    from fedloom.registry import class_names

    found = class_names()
    if name not in found:
        raise AttributeError(lacking + nearest(name, [*__all__, *found]))
    return found[name].load(object)
