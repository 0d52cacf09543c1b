"""The problem at one client: made of data of its own, or of its share of data that every side has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedloom import tasks
from fedloom.deploy.config import ClientConfig
from fedloom.errors import UsageError
from fedloom.runs.spec import Spec
from fedloom.task import Task


def task_of(config: ClientConfig, spec: Spec, offer: Mapping[str, Any], number: int) -> Task:
    """The task in which this client is the one with that number; raises UsageError where its data do not fit."""
    if config.data.share:
        if "data" not in offer["settings"]:
            raise UsageError(
                "the data of this run have no name that every side knows, so that there is no share of them; name "
                'data of your own under [data]: file = "..." or loader = "site.py:load"'
            )
        return tasks.build(replace(spec, data=offer["settings"]["data"]))
    raise UsageError("not yet")
