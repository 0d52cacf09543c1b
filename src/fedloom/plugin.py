"""Methods around any other method: calibration after its training, fine-tuning at its server, ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.method import Method, client

if TYPE_CHECKING:
    from fedloom.cohort import Cohort
    from fedloom.node import Client, Server


@dataclass(frozen=True)
class Plugin(Method):
    """A method around another one, `inner`: whatever it does not give itself is that one's.

    A field of the type `Method` takes a method, its name, or its name and fields: `{"name": "fedprox", "mu": 0.1}`. The
    inner method's client functions are called as they are, with their own messages: `self.inner.round(server, cohort)`.
    """

    inner: Method

    # What is declared of the replies, and of the global model, is the inner method's.
    global_model = property(lambda self: self.inner.global_model)
    compressible = property(lambda self: self.inner.compressible)
    private = property(lambda self: self.inner.private)

    def setup(self, server: Server, clients: Cohort) -> None:
        self.inner.setup(server, clients)

    def select(self, server: Server, clients: Cohort) -> Cohort | None:
        return self.inner.select(server, clients)

    def round(self, server: Server, cohort: Cohort) -> None:
        self.inner.round(server, cohort)

    def finish(self, server: Server, clients: Cohort) -> None:
        self.inner.finish(server, clients)

    def observe(self, server: Server, clients: Cohort) -> Any:
        return self.inner.observe(server, clients)

    @client
    def predict(self, client: Client, **message: Any) -> Any:  # type: ignore[override]
        return self.inner.predict(client, **message)

    def predict_message(self, server: Server) -> dict[str, Any]:
        return self.inner.predict_message(server)
