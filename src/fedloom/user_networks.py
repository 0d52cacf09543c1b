"""What a setting calls a network that its user has made: `FILE.py:NAME`, `MODULE:NAME`, or what only Python has."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import UsageError
from fedloom.user_files import USERS, module_at

# What only this process has is `python:NAME`, of modules with a digest of their weights.
OWN = re.compile(r"(?P<place>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)(?P<which>-\d+|@[0-9a-f]{8})?")
PYTHON = "python"
GIVEN: dict[str, Callable[..., Any]] = {}  # what was given in this process, by its text


def named_network(given: Any) -> Any:
    """What stands in the setting `model` for a network given in Python: a module, a class, or a function.

    A class or function that a file gives again is called by the file, so that other processes find it; a module, which
    has weights, is known in this process alone. Anything else is left as it is.
    """
    if callable(getattr(given, "state_dict", None)) and not isinstance(given, type):  # an nn.Module
        text = f"{PYTHON}:{type(given).__name__}@{_digest(given)}"
        if text not in GIVEN:  # copied, as its owner may go on to change it
            GIVEN[text] = copy.deepcopy(given)
        return text
    if not callable(given):
        return given
    text = _place_of(given)
    count = 1
    while GIVEN.get(text, given) is not given:  # as of a cell of a notebook that was run twice
        count += 1
        text = f"{_place_of(given)}-{count}"
    GIVEN[text] = given
    return text


def is_own(text: str, library: Mapping[str, Any]) -> bool:
    """Whether a setting names a network that its user has made, and none of the library's by name."""
    found = OWN.fullmatch(text)
    if found is None:
        return False
    place = found["place"]
    if place == PYTHON or place.endswith(".py"):
        return True
    try:
        return place not in library and importlib.util.find_spec(place) is not None
    except (ImportError, ValueError):
        return False


def placed_network(given: Any) -> Any:
    """What stands for a network, of a file by the path that holds in every working folder."""
    text = named_network(given)
    found = OWN.fullmatch(text) if isinstance(text, str) else None
    own = found is not None and found["place"].endswith(".py") and Path(found["place"]).is_file()
    return text.replace(found["place"], str(Path(found["place"]).resolve()), 1) if found and own else text


def file_of(text: str | None) -> str | None:
    """The file that makes the network of this name; None where it is none of a file."""
    found = OWN.fullmatch(text or "")
    return found["place"] if found and found["place"].endswith(".py") else None


def only_in_python(text: str | None) -> bool:
    """Whether a network is known in this process alone."""
    found = OWN.fullmatch(text or "")
    return found is not None and found["place"] == PYTHON


def unfound(text: str) -> str:
    """What is to be said where `MODULE:NAME` names a module that this process does not find; else nothing."""
    found = OWN.fullmatch(text)
    if found is None or found["place"].endswith(".py") or found["place"] == PYTHON:
        return ""
    return (
        f"no module {found['place']!r} is found here; a process of its own, as comparisons have them, finds what is "
        "installed or lies on PYTHONPATH: see to that, or give the class or function a file of its own, "
        f"model=FILE.py:{found['name']}"
    )


def network_at(text: str) -> Any:
    """The module, class or function of a network's name. Raises UsageError where there is none."""
    if text in GIVEN:
        return GIVEN[text]
    own = OWN.fullmatch(text)
    assert own is not None
    place, name = own["place"], own["name"]
    if place == PYTHON or own["which"]:
        raise UsageError(
            f"the network {name} was given in Python, where no file gives it again; give it again (model=...), or "
            f"write a class or function for it into a file: model=FILE.py:{name}"
        )
    module = module_at(Path(place), "network") if place.endswith(".py") else importlib.import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)]
        raise UsageError(f"{place} has no network {name!r} (it has: {', '.join(known) or 'none'})")
    return found


def _place_of(given: Any) -> str:
    """Where a class or function is found again: `FILE.py:NAME`, of a package `MODULE:NAME`, or else `python:NAME`."""
    bottom = getattr(given, "func", given)  # of functools.partial
    name = re.sub(r"\W", "", getattr(bottom, "__name__", type(bottom).__name__)) or "network"
    module = inspect.getmodule(given)
    whole = module is not None and getattr(given, "__qualname__", "") == name and vars(module).get(name) is given
    if whole and module is not None:
        if module.__package__ and not module.__name__.startswith(USERS):
            return f"{module.__name__}:{name}"
        file = Path(getattr(module, "__file__", None) or "")
        if file.is_file() and file.suffix == ".py":
            return f"{file.resolve()}:{name}"
    return f"{PYTHON}:{name}"


def _digest(net: Any) -> str:
    """What tells modules apart: their parts, the bits of their weights, and which of these are learned."""
    import torch

    whole = hashlib.blake2b(repr(net).encode(), digest_size=4)
    for name, value in net.state_dict(keep_vars=True).items():
        whole.update(f"{name} {value.requires_grad}".encode())
        if not isinstance(value, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
            whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
