"""FedGH."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.task import Data
from fedloom.variety import of_one_head, own


@dataclass(frozen=True)
class FedGH(Method):
    """Can clients with different feature extractors share one head that the server trains on their class means?

    Yi, Wang, Liu, Shi, Yu: FedGH: Heterogeneous Federated Learning with Generalized Global Header, ACM Multimedia 2023,
    arXiv 2303.13137 (official code LipingYi/FedGH; re-implementation HtFLlib).

        client k:  H_k <- H (from the second round on);  (phi_k, H_k) <- E epochs of SGD
                   r_kc <- mean of phi_k(x) over its samples of class c;  send all (r_kc, c)
        server:    H <- S epochs of SGD on CE(H(r), c) over the pairs that came

    Departures:
    1. The server's optimizer moves the server's head; in the official script it holds a client's parameters.
    2. Means are exact and in evaluation mode; the official script averages batch means in training mode.
    3. The pairs are shuffled into batches, as in HtFLlib; the official script steps once a pair, in client order.
    4. Judged is the personal model after its own training, with its own head. Its running statistics never leave it.

    Identities: a head that is never trained at the server is one and the same for all; what a client sends does not
    depend on the size of its extractor.
    """

    lr: LearningRate = 0.05  # local learning rate; the official code takes 0.01 with momentum 0.9
    epochs: Positive[int] = 1  # E: local epochs; the official code takes 10
    batch: int = 10  # batch size; the official code takes 64
    server_lr: Annotated[float, Log(1e-3, 1.0)] = 0.01  # learning rate of the head at the server, as in HtFLlib
    # S: epochs over the pairs; between the official single pass and HtFLlib's many
    server_epochs: Annotated[int, Log(1, 100)] = 5
    server_batch: int = 10  # pairs a step; HtFLlib's batch size
    clip: float = 50.0  # bound on the length of the server's gradient, as in the official code
    models: tuple[str, ...] = ()  # networks by name, dealt to the clients in turn; none: the task's for everybody

    by_class = by_head = True
    global_model = False
    refuses = {"aggregate": "the server trains a head on what clients send, and averages nothing"}

    def setup(self, server, clients):
        of_one_head(server, self.models)

    def round(self, server, cohort):
        head = server.model.select("head.*") if server.round > 1 else None
        pairs = [(r, c) for up in cohort.call(self.local, head=head) for c, r in up.protos.items()]
        if not pairs:
            return
        data = Data(torch.stack([r for r, _ in pairs]), torch.tensor([c for _, c in pairs]).to(pairs[0][0].device))
        if self.server_lr:
            server.model, _ = server.descend(
                server.model,
                lr=self.server_lr,
                epochs=self.server_epochs,
                batch=self.server_batch,
                loss=server.task.head_loss,
                clip=self.clip,
                only="head.*",
                data=data,
            )

    @client
    def local(self, client, head):
        w = client.state.get("model", own(client, self.models))
        w, _ = client.descend(w if head is None else w.merge(head), lr=self.lr, epochs=self.epochs, batch=self.batch)
        client.state["model"] = w
        x, y = client.data.all()
        features = client.features(w, x)
        return {"protos": {int(c): features[y == c].mean(0) for c in y.unique()}}

    @client
    def predict(self, client):
        return client.state.get("model", own(client, self.models))
