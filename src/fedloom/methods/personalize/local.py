"""Local training: the lower end of the scale."""

from dataclasses import dataclass

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive
from fedloom.variety import own


@dataclass(frozen=True)
class Local(Method):
    """How good is each client's model if it never hears from anybody?

    No federated algorithm: every client goes on training its own model, one epoch a round by default.

        client k, round:  for E epochs, for each batch b:  w_k <- w_k - eta grad l(w_k; b)

    Departures: none. Models of one network start from the same initial weights, which the shared seed gives at no
    bytes. Running statistics never leave their client.

    Identities: nothing is sent but the request; one client alone is FedAvg with one client (to rounding).
    """

    lr: LearningRate = 0.05  # eta: learning rate
    epochs: Positive[int] = 1  # epochs a round
    batch: int = 10  # batch size
    models: tuple[str, ...] = ()  # networks by name, dealt to the clients in turn; none: the task's for everybody

    global_model = False
    refuses = dict.fromkeys(
        map("attack={}".format, ["sign_flip", "gaussian", "zero", "free_rider", "nan", "alie", "ipm", "mimic", "dmpa"]),
        "its clients send nothing that could be tampered with",
    )

    def round(self, server, cohort):
        cohort.call(self.local)

    @client
    def local(self, client):
        w = client.state.get("model", own(client, self.models))
        client.state["model"], _ = client.descend(w, lr=self.lr, epochs=self.epochs, batch=self.batch)

    @client
    def predict(self, client):
        return client.state.get("model", own(client, self.models))
