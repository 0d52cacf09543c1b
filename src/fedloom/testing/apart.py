"""How a method lives between machines: with each client's data and state where they are, and bytes in between."""

from __future__ import annotations

from fedloom.deploy.strict import Strict
from fedloom.engines.remote import has_form
from fedloom.errors import UsageError
from fedloom.testing.lab import Lab, alike, trace


def check_strict(lab: Lab) -> None:
    """With its clients in a process that gets bytes alone, and a server without their data, no bit changes.

    Or it is refused before the first round, where its calls have no network form.
    """
    try:
        has_form(lab.method)
    except UsageError:
        return
    alike(lab.serial, trace(lab.experiment(engine=Strict())), "serial and clients in a process of their own differ")


CHECKS = (check_strict,)
