"""FedASMU."""

from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Annotated

from fedloom.method import Method, client
from fedloom.ops.overlap import idle_up_to_cohort
from fedloom.ranges import LearningRate, Linear, Log, Positive


@dataclass(frozen=True)
class FedASMU(Method):
    """Can the weight of a stale model be learned, and a device refresh its model in the middle of its work?

    Liu, Jia, Che, Huo, Ren, Zhou, Dai, Dou: FedASMU: Efficient Asynchronous Federated Learning with Dynamic
    Staleness-aware Model Update, AAAI 2024, arXiv 2312.05770.

        client i:  from w_o, f L of L steps;  ask for the newest w_g;  if g > o:
                   phi <- gamma / sqrt(g) (1 - upsilon / sqrt(g - o + 1));  beta <- mu_b phi / (1 + mu_b phi)
                   w <- w + beta (w_g - w);   the other steps;   send w
        server:    t <- number of this update;  d <- t - o + 1;  if d > tau: drop it, else
                   xi <- lambda_i / (sqrt(t) d^sigma_i) + iota_i;   alpha <- mu_a xi / (1 + mu_a xi)
                   w <- (1 - alpha) w + alpha w_i
        both:      gradient steps on lambda_i, sigma_i, iota_i and on gamma_i, upsilon_i

    Departures:
    1. The server steps its coefficients along (w_o - w_i) / (eta L) for the gradient, for the paper's needs data there;
       a client steps its own along the first gradient after its refresh. Both are ours: the paper gives no code.
    2. The time of the refresh is the fixed share f; the paper learns it by reinforcement.
    3. The second part of the work draws its own batches. A client asks for the newest model by ending its first part.
    4. Devices begin when others end; the paper's server triggers some in constant periods.

    Identities: mu_b=0 or refresh=1: no refresh; with server_rate=0 the server is then FedAsync with the weights alpha.
    """

    lr: LearningRate = 0.1  # eta: local learning rate; the paper tunes it
    epochs: Positive[int] = 2  # L, in epochs; the paper takes 5
    batch: int = 10  # local batch size
    lam: float = 1.0  # lambda: first value, as in a re-implementation (so are the next six)
    sigma: float = 0.5  # sigma: first value
    iota: float = 0.0  # iota: first value
    mu_a: Annotated[float, Log(0.1, 10.0)] = 1.0  # mu_alpha
    gamma: float = 1.0  # gamma: first value
    upsilon: float = 0.5  # upsilon: first value
    mu_b: float = 1.0  # mu_beta
    # f: share of the steps before the refresh, 1: none; the paper learns it
    refresh: Annotated[float, Linear(0.0, 1.0)] = 0.5
    server_rate: float = 0.01  # eta_a: of lambda, sigma, iota; ours
    client_rate: float = 0.01  # eta_b: of gamma, upsilon; ours
    tau: int = 99  # tau: staleness beyond which work is dropped; ours

    updates = {"model": "state.start"}
    refuses = dict.fromkeys(
        ("attack=alie", "attack=mimic"), "its replies come one by one, and hide among no others"
    ) | {"optimizer": "it reads slopes off plain steps"}

    def setup(self, server, clients):
        server.version = 1  # the number of the update that comes next
        server.bases = {}  # client -> (the version, the model) that it began with
        server.weights = {}  # client -> lambda, sigma, iota

    def round(self, server, cohort):
        idle = idle_up_to_cohort(cohort, server.rng("idle"))
        server.bases = server.bases | dict.fromkeys(idle, (server.version, server.model))
        idle.submit(self.begin, model=server.model)
        while cohort.working:
            ended = cohort.wait(1)
            for reply in ended:
                base, start = server.bases[reply.client]
                if "model" in reply.fields:
                    self.update(server, reply, base, start)
                    return
                newer = server.model if server.version > base else None
                versions = [base, server.version]
                cohort.clients_by_id([reply.client]).submit(self.end, done=reply.steps, newer=newer, versions=versions)

    def update(self, server, reply, base, start):
        """Mixes a client's model in."""
        t, d = server.version, server.version - base + 1
        server.bases = {k: kept for k, kept in server.bases.items() if k != reply.client}
        if d > self.tau:
            return
        lam, sigma, iota = server.weights.get(reply.client, (self.lam, self.sigma, self.iota))
        scale = 1 / (sqrt(t) * d**sigma)
        xi = lam * scale + iota
        alpha = self.mu_a * xi / (1 + self.mu_a * xi)
        away = reply.model - server.model
        slope = float((start - reply.model).params @ away.params) / (self.lr * reply.steps)  # dF/dalpha
        slope *= self.server_rate * self.mu_a / (1 + self.mu_a * xi) ** 2
        new = (lam - slope * scale, sigma + slope * scale * lam * log(d), iota - slope)
        server.weights = server.weights | {reply.client: [max(new[0], 1e-6), max(new[1], 0.0), max(new[2], 0.0)]}
        server.model = server.model + alpha * away
        server.version = t + 1
        server.log(alpha=alpha, staleness=d - 1)

    @client
    def begin(self, client, model):
        steps = ceil(client.n / (self.batch or client.n)) * self.epochs
        first = int(min(self.refresh, 1.0) * steps)
        w, _ = client.descend(model, lr=self.lr, steps=first, batch=self.batch)
        if first == steps:
            return {"model": w, "steps": steps}
        client.state.update(half=w, start=model)
        return {"steps": first}

    @client
    def end(self, client, done, newer, versions):
        steps = ceil(client.n / (self.batch or client.n)) * self.epochs
        w, _ = client.state.pop("half").clone(), client.state.pop("start")
        if newer is not None and self.mu_b:
            w = self.refreshed(client, w, newer, *versions)
            done += 1
        w, _ = client.descend(w, lr=self.lr, steps=steps - done, batch=self.batch)
        return {"model": w, "steps": steps}

    def refreshed(self, client, w, newer, base, version):
        """The client's model after it took in a newer one, and one step of SGD, by which it learns how much to take."""
        gamma, upsilon = client.state.get("refresh", (self.gamma, self.upsilon))
        age, scale = 1 / sqrt(version - base + 1), 1 / sqrt(version)
        phi = max(gamma * scale * (1 - upsilon * age), 0.0)
        beta = self.mu_b * phi / (1 + self.mu_b * phi)
        away = newer - w
        w = w + beta * away
        gradient = client.grad(w, next(client.batches(self.batch)))
        slope = self.client_rate * float(gradient.params @ away.params) * self.mu_b / (1 + self.mu_b * phi) ** 2
        if phi:
            gamma, upsilon = gamma - slope * scale * (1 - upsilon * age), upsilon + slope * gamma * scale * age
            client.state["refresh"] = [max(gamma, 0.0), max(upsilon, 0.0)]
        return w - self.lr * gradient
