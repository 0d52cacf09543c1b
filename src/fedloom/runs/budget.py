"""What a run may cost, and what it has cost so far."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fedloom.runs.spec import BUDGETS, Spec


class Spent:
    """What a run's rounds have cost so far, beside its budgets."""

    COSTS = MappingProxyType(
        {
            "max_seconds": ("seconds",),
            "max_steps": ("gradient_steps",),
            "max_bytes": ("up_bytes", "down_bytes", "peer_bytes"),
            "max_virtual_seconds": ("virtual_seconds",),
        }
    )

    def __init__(self, spec: Spec) -> None:
        self.budgets = {name: getattr(spec, name) for name in BUDGETS if getattr(spec, name) is not None}
        self.used = dict.fromkeys(self.budgets, 0.0)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in a round."""
        for name in self.used:
            self.used[name] += sum(row.get(cost, 0) for cost in self.COSTS[name])

    def over(self) -> str | None:
        """Which budget is spent, if one is."""
        for name, budget in self.budgets.items():
            if self.used[name] >= budget:
                return f"{name}={budget} is spent"
        return None
