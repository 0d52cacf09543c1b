"""Asynchronous Local-SGD with delayed Nesterov momentum and dynamic local updates."""

from dataclasses import dataclass
from math import cos, floor, pi
from typing import Annotated, Literal

from fedloom.cohort import Each
from fedloom.method import Method, client
from fedloom.ops.adam import Adam
from fedloom.ops.overlap import apply_update, idle_up_to_cohort, seconds_a_step, update_message
from fedloom.ranges import LearningRate, Linear, Log


@dataclass(frozen=True)
class AsyncLocalSGD(Method):
    """Can the server's momentum survive asynchrony, if it moves once for as many updates as there are workers?

    Liu, Chhaparia, Douillard, Kale, Rusu, Shen, Szlam, Ranzato: Asynchronous Local-SGD Training for Language Modeling,
    2024, arXiv 2401.09135 (Algorithm 3 and Equation 6).

        worker:  h inner steps from theta;   send g = theta - theta_end
        server:  D <- D + g
                 each Nth:  m <- beta m + D/N;   theta <- theta - eps ((1 - c N + c) beta m + g/N);   D <- 0
                 others:                         theta <- theta - eps (c beta m + g/N)
                 workers that end within the grace period are taken in before any begins anew
        DyLU:    h = floor(v / max v * H), at least 1, for a worker that takes v steps a second

    Departures:
    1. Every client trains on its own data, so there is no choice of shards; its schedule and moments are its own.
    2. In the inner rate's cosine, `horizon` counts a client's own steps. The paper starts from a pretrained model.
    3. A worker's speed comes of how long its last work took, the messages included.
    4. Running statistics of BatchNorm go by 1/N of the way toward a worker's. A lost push does not count.
    5. A round is the pushes of one grace period.

    Identities: window=1, c=0 is Nesterov's momentum of torch on the sequence of g; beta=0: theta <- theta - eps g/N.
    """

    lr: LearningRate = 0.01  # inner rate; the paper takes AdamW with some 4e-4 for language models
    inner: Literal["adamw", "sgd"] = "adamw"  # the inner optimizer, as in the paper; its moments stay at the client
    weight_decay: float = 0.1  # of AdamW, decoupled, as is usual for language models
    warmup: int = 0  # inner steps in which a client's rate grows to lr
    horizon: int = 0  # inner steps after which a client's rate is lr/10, along a cosine; 0: constant
    batch: int = 10  # local batch size; the paper takes 512
    steps: int = 20  # H: inner steps of the fastest worker; the paper takes 50
    dynamic: bool = True  # DyLU: slower workers take fewer steps
    window: int = 0  # N: pushes between two moves of the momentum; 0: the number of workers, as recommended
    server_lr: Annotated[float, Log(0.1, 1.0)] = 0.7  # epsilon: outer rate, as in DiLoCo
    beta: Annotated[float, Linear(0.0, 0.99)] = 0.9  # beta: outer momentum, as in DiLoCo
    c: float = 0.0  # c: share of the momentum in every push, 0 to 1/N; the paper takes 0
    grace: float = 0.0  # seconds of the world's clock; the paper takes 1 where a job takes a minute

    compressible = ("delta",)
    private = ("delta",)
    light = {"steps": 4}

    def setup(self, server, clients):
        server.m = server.model.params.zeros_like()
        server.gathered = server.model.params.zeros_like()  # D
        server.pushes = 0  # t
        server.speed = {}  # v: steps a second

    def round(self, server, cohort):
        idle = idle_up_to_cohort(cohort, server.rng("idle"))
        steps = {k: self.share(server.speed, k) for k in idle}
        idle.submit(self.local, model=server.model, steps=Each(steps))
        ended = list(cohort.wait(min(1, cohort.working)))
        ended += cohort.wait(None, deadline=self.grace)
        for reply in ended:
            self.push(server, reply, self.window or len(cohort))
            server.speed = server.speed | {reply.client: 1 / seconds_a_step(reply, reply.steps)}

    def push(self, server, reply, n):
        """One update, with momentum if it is the last of a window of n."""
        g = -reply.delta
        server.gathered = server.gathered + g
        share = self.c
        if (server.pushes + 1) % n == 0:
            server.m = self.beta * server.m + server.gathered / n
            server.gathered = g.zeros_like()
            share = 1 - self.c * n + self.c
        reply.fields["delta"] = -(share * self.beta * server.m + g / n)
        server.model = apply_update(server.model, reply, self.server_lr, 1 / n)
        server.pushes = server.pushes + 1
        server.log(staleness=reply.staleness)

    def share(self, speed, k):
        """The inner steps of a worker."""
        if not self.dynamic or k not in speed:
            return self.steps
        return max(1, floor(speed[k] / max(speed.values()) * self.steps + 1e-6))

    @client
    def local(self, client, model, steps):
        if self.inner == "sgd" and not (self.warmup or self.horizon):
            w, _ = client.descend(model, lr=self.lr, steps=steps, batch=self.batch)
            return {**update_message(w, model), "steps": steps}
        w, done, moments = model.clone(), client.state.get("done", 0), client.state.get("moments", {})
        for batch in client.batches(self.batch, steps=steps):
            rate = self.rate(done)
            g = client.grad(w, batch)
            if self.inner == "sgd":
                w = w - rate * g
            else:
                kept = w.merge((1 - rate * self.weight_decay) * w.params)
                w, moments = Adam(rate).step(kept, g, moments)
            done += 1
        client.state["done"] = done
        if moments:
            client.state["moments"] = moments
        return {**update_message(w, model), "steps": steps}

    def rate(self, done):
        """The inner rate after so many steps of a client."""
        if done < self.warmup:
            return self.lr * (done + 1) / self.warmup
        if not self.horizon:
            return self.lr
        along = min(1.0, (done - self.warmup) / max(1, self.horizon - self.warmup))
        return self.lr * (0.1 + 0.45 * (1 + cos(pi * along)))
