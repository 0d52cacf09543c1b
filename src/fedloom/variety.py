"""Clients whose networks differ but for the head: by name, dealt to them in turn."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.errors import UsageError
from fedloom.node import Client, Server
from fedloom.vector import Vector


def own(client: Client, models: Sequence[str]) -> Vector:
    """The initial weights of a client's network: of the one of `models` that falls to it, or of the task's if none."""
    return client.network(models[client.id % len(models)]) if models else client.initial


def of_one_head(server: Server, models: Sequence[str]) -> None:
    """Raises UsageError unless the networks have heads as the task's network has: features of one length come in."""
    head = server.model.select("head.*").layout
    for model in models:
        its = server.network(model).select("head.*").layout
        if its != head:
            raise UsageError(
                f"the head of {model} is {its}, that of the run's own network is {head}; what clients share fits one "
                "head only: take models whose last hidden layers are equally wide"
            )
