"""FedBuff."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.method import Method, client
from fedloom.ops.overlap import apply_update, discount_by_staleness, idle_up_to_cohort, update_message
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedBuff(Method):
    """Can the server go on as soon as a few clients have ended, while the others still work?

    Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba: Federated Learning with Buffered Asynchronous Aggregation,
    AISTATS 2022, arXiv 2106.06639 (Algorithm 1).

        client i:  y <- w;  local steps y <- y - eta_l g(y);   send y - w
        server:    as each difference arrives, add s(staleness) times it to the buffer
                   with K in the buffer:  w <- w + eta_g / K * buffer;   empty it
                   s(t) = (1 + t)^-a

    Departures:
    1. Who has ended gets new work when the server steps, not before: it would only train on the same model again.
    2. The mean over the buffer is weighted by samples, as FedAvg's is.
    3. Work that is lost takes its place in the buffer, so that the server never waits for what cannot come.
    4. Running statistics of BatchNorm go toward the buffer's mean, by K over the number of clients at work.

    Identities: buffer=0 waits for everybody and is FedAvg, bitwise (with BatchNorm to rounding); so is any buffer as
    large as the cohort.
    """

    lr: LearningRate = 0.05  # eta_l: local learning rate; the paper tunes it per task
    epochs: Positive[int] = 1  # local epochs, as in the paper
    batch: int = 10  # local batch size; the paper takes 32
    server_lr: Annotated[float, Log(0.1, 3.0)] = 1.0  # eta_g: the paper tunes it per task
    # K: the paper takes 10 with a thousand clients at work; 0: as many as are at work
    buffer: Annotated[int, Log(2, 20)] = 3
    decay: float = 0.5  # a: as in the paper, 1 / sqrt(1 + staleness)

    compressible = ("delta",)
    private = ("delta",)

    def round(self, server, cohort):
        idle_up_to_cohort(cohort, server.rng("idle")).submit(self.local, model=server.model)
        at_work = cohort.working
        replies = cohort.wait(min(self.buffer or at_work, at_work))
        up = discount_by_staleness(replies, self.decay).mean(weight="n")
        server.model = apply_update(server.model, up, self.server_lr, up.count / at_work)
        server.log(staleness=sum(reply.staleness for reply in replies) / up.count)

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {**update_message(w, model), "n": client.n}
