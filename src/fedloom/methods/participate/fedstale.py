"""FedStale."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fedloom.errors import NobodyReplied
from fedloom.method import Method, client
from fedloom.methods.participate._intervals import Intervals
from fedloom.ops.overlap import apply_update, update_message
from fedloom.ranges import LearningRate, Linear, Positive


@dataclass(frozen=True)
class FedStale(Method):
    """How much should the last update of a client count that seldom comes?

    Rodio, Neglia: FedStale: leveraging stale client updates in federated learning, ECAI 2024, arXiv 2405.04171.

        client k:  E epochs of SGD from w;   send D_k = w_k - w
        server:    fresh = sum_{k in S} alpha_k / p_k D_k
                   stale = sum_{all k} alpha_k h_k - sum_{k in S} alpha_k / p_k h_k
                   w <- w + eta_s (fresh + beta stale);   then h_k <- D_k for k in S

    Departures:
    1. Unknown p_k are one over FedAU's mean interval, cut off at K rounds, so that no weight explodes.
    2. A round in which nobody comes leaves the model, as in the official code.
    3. Running statistics of BatchNorm get the average over S by samples, and no memory.

    Identities: everybody in every round: FedAvg for any beta; beta=0: FedAvg with weights 1/p; beta=1: FedVARP.
    """

    lr: LearningRate = 0.05  # eta_l: local learning rate; the official script takes 5e-3
    epochs: Positive[int] = 1  # E: as in the official script
    batch: int = 10  # local batch size; the official script takes 128
    beta: Annotated[float, Linear(0.0, 1.0)] = 0.5  # beta: weight of stale updates, as in the official script
    server_lr: float = 1.0  # eta_s: as in the official script
    rates: Literal["estimated", "cohort"] = "estimated"  # p_k: by FedAU's rule, or |S| / N where the draw is uniform
    cutoff: int = 50  # K: of the estimate, as in FedAU

    compressible = ("delta",)
    private = ("delta",)

    def setup(self, server, clients):
        server.intervals = Intervals.none(server.population).value()
        server.stale = {}  # h
        total = sum(clients.info(k)["n"] for k in clients)
        server.share = [clients.info(k)["n"] / total for k in clients]  # alpha

    def round(self, server, cohort):
        replies, known = cohort.call(self.local, model=server.model), Intervals(*server.intervals)
        if not replies:
            raise NobodyReplied(f"none of the {len(cohort)} clients replied to local in round {server.round}")
        memory = sum((server.share[k] * h for k, h in server.stale.items()), server.model.params.zeros_like())
        step = self.beta * memory
        for reply in replies:
            k = reply.client
            weight = server.population / len(replies) if self.rates == "cohort" else known.mean[k].item()
            h = server.stale.get(k)
            kept = reply.delta if h is None else reply.delta - self.beta * h
            step = step + server.share[k] * weight * kept
        up = replies.mean(weight="n")
        up.fields["delta"] = step
        server.model = apply_update(server.model, up, self.server_lr, 1.0)
        server.stale = server.stale | {reply.client: reply.delta for reply in replies}
        server.intervals = known.after(server.round, [reply.client for reply in replies], self.cutoff).value()

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {**update_message(w, model), "n": client.n}
