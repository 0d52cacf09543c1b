"""The contract that every method passes: what is checked, and with which small problems.

`contract` has what holds of a method by itself, `apart` how it lives between machines, `settings` how it meets
the settings of a run, `lab` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fedloom.method import Method
from fedloom.testing import apart, contract, settings
from fedloom.testing.contract import *  # noqa: F403
from fedloom.testing.lab import *  # noqa: F403
from fedloom.testing.lab import ContractError, Lab

CHECKS: tuple[Callable[[Lab], None], ...] = (
    *(function for name, function in vars(contract).items() if name.startswith("check_")),
    *apart.CHECKS,
    *settings.CHECKS,
)

OnCheck = Callable[[str, str | None, float], object]


def check_method(
    method: Method | type[Method],
    checks: Sequence[Callable[[Lab], None]] = CHECKS,
    on_check: OnCheck = lambda name, problem, seconds: None,
    device: str = "cpu",
) -> None:
    """Puts a method through the contract; raises ContractError with a line for every check that fails.

    `on_check(name, problem or None, seconds)` is told of every check as it ends.
    """
    lab, problems = Lab(method, device), []
    for check in checks:
        began = time.perf_counter()
        problem = None
        try:
            check(lab)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong under a check is what the check found
            problem = str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
            problems.append(f"{title(check)}: {problem}")
        on_check(title(check), problem, time.perf_counter() - began)
    if problems:
        raise ContractError("\n".join(problems))


def title(check: Callable[[Lab], None]) -> str:
    """A check's name in words."""
    return check.__name__.removeprefix("check_").replace("_", " ")
