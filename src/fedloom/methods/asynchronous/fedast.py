"""FedAST."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.cohort import Replies, Reply
from fedloom.method import Method, client
from fedloom.ops.overlap import apply_update, idle_up_to_cohort, update_message
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedAST(Method):
    """How should one pool of clients train several unrelated models at once, so that no slow one blocks the others?

    Askin, Sharma, Joe-Wong, Joshi: FedAST: Federated Asynchronous Simultaneous Training, UAI 2024, arXiv 2406.00302.

        client:   tau local steps for task m from w_m;   send the difference
        arrival:  into the buffer of m;  with b_m there:  w_m <- w_m + eta_g / |B_m| sum B_m, no staleness weight
        refill:   while fewer than R_m jobs of m are under way: a new one for a client drawn at random
        now and then:  V_m <- mean over its last 8 differences of |delta - mean|^2 / |mean|^2, over (eta_l tau)^2
                  R_m proportional to V_m, in multiples of rho, at least rho, the sum kept;   b_m <- R_m / rho

    Departures:
    1. A client has one job at a time (the paper's may queue several), and jobs go to idle clients only.
    2. What arrives at one moment is taken in before anybody begins anew.
    3. The score is over all parameters (the official code: without biases), and a new R_m is filled at once.
    4. No task ends before the run does. A round is the tasks' steps of one moment, or as many lost jobs as
       the cohort has clients.

    Identities: one task, dynamic=False, clients of one size: FedBuff without discount, which weighs by samples; no step
    of a task moves another's model.
    """

    lr: LearningRate = 0.05  # eta_l: local learning rate; the paper takes 0.06 to 0.1
    epochs: Positive[int] = 3  # local epochs, as in the paper
    batch: int = 10  # local batch size; the paper takes 32
    server_lr: Annotated[float, Log(0.1, 1.0)] = 1.0  # eta_g: the official code takes 0.1
    buffer: Annotated[int, Log(1, 10)] = 3  # b_m at the start: rho is R_m over it, as in the paper's 96 jobs and 32
    dynamic: bool = True  # whether the R_m follow the variances
    power: float = 1.0  # of the score in the allocation, as released; the paper's square root is 0.5

    compressible = private = ("delta",)
    refuses = {"optimizer": "it reads the variance of gradients off plain steps"}
    needs = ("several",)

    def networks(self, site):
        return {f"part {m}": site.network(f"part:{m}") for m in range(1, len(site.task.parts))}

    def setup(self, server, clients):
        models = [server.model, *server.nets.values()]
        server.parts = [{"model": w, "version": 0, "buffer": [], "recent": [], "target": 0} for w in models]
        server.jobs = {}  # client -> its task
        server.rho, server.arrived = 1, 0

    def round(self, server, cohort):
        parts, jobs = [dict(part) for part in server.parts], dict(server.jobs)
        if not parts[0]["target"]:
            server.rho = max(1, len(cohort) // (len(parts) * max(1, self.buffer)))
            allot(parts, [1.0] * len(parts), len(cohort), server.rho)
        stepping, lost = [], 0
        while not stepping and lost < len(cohort):
            self.refill(server, cohort, parts, jobs)
            if not cohort.working:
                break
            for ended in (cohort.wait(1), cohort.wait(None, deadline=0.0)):  # and what ends at the same moment
                for reply in ended:
                    parts[reply.part]["buffer"] = [*parts[reply.part]["buffer"], reply.fields]
                server.arrived, lost = server.arrived + len(ended), lost + len(ended.missing)
                for k in ended.asked:
                    del jobs[k]
            stepping = [part for part in parts if len(part["buffer"]) >= max(1, part["target"] // server.rho)]
        for part in stepping:
            self.step(part)
        total = sum(part["target"] for part in parts)
        if self.dynamic and server.arrived >= 0.75 * total * len(parts) and all(p["version"] > 8 for p in parts):
            allot(parts, [variance(part["recent"], self.lr) ** self.power for part in parts], total, server.rho)
            server.arrived = 0
        server.parts, server.jobs, server.model = parts, jobs, parts[0]["model"]

    def refill(self, server, cohort, parts, jobs):
        """Gives idle clients jobs of the tasks that lack the most."""
        idle = idle_up_to_cohort(cohort, server.rng("idle"))
        order = torch.randperm(len(idle), generator=server.rng("client")).tolist()
        active = [list(jobs.values()).count(m) for m in range(len(parts))]
        for place in order[: max(0, sum(part["target"] for part in parts) - len(jobs))]:
            m = min(range(len(parts)), key=lambda m: (active[m] - parts[m]["target"], parts[m]["version"], m))
            active[m] += 1
            jobs[idle[place]] = m
        for m, part in enumerate(parts):
            given = cohort.clients_by_id([k for k in idle if jobs.get(k) == m])
            if given:
                given.submit(self.local, model=part["model"], part=m)

    def step(self, part):
        """One task's step."""
        buffer = part["buffer"]
        up = Replies([Reply(i, one) for i, one in enumerate(buffer)], range(len(buffer))).mean("delta", "statistics")
        part["model"] = apply_update(part["model"], up, self.server_lr, min(1.0, len(buffer) / part["target"]))
        part["version"] += 1
        if self.dynamic:
            part["recent"] = [*part["recent"], *({"delta": r["delta"], "steps": r["steps"]} for r in buffer)][-8:]
        part["buffer"] = []

    def observe(self, server, clients):
        for m, part in enumerate(server.parts if not server.site.blind else ()):
            problem = server.task.parts[m]
            with torch.no_grad():
                measured = problem.judge(server.net(part["model"]), problem.global_test())
            server.log(**{f"part_{m}_{name}": value for name, value in measured.items() if name != "n"})

    @client
    def local(self, client, model, part):
        problem = client.task.parts[part]
        w, steps = client.descend(
            model,
            lr=self.lr,
            epochs=self.epochs,
            batch=self.batch,
            loss=problem.loss,
            data=problem.data(client.id, "train"),
        )
        return {**update_message(w, model), "part": part, "steps": steps}


def allot(parts, scores, total, rho):
    """Splits `total` jobs in proportion to the scores, in multiples of rho, with at least rho for each."""
    units, fixed = max(len(parts), total // rho), set()
    scores = scores if sum(scores) else [1.0] * len(parts)
    while True:
        rest, free = sum(score for m, score in enumerate(scores) if m not in fixed), units - len(fixed)
        wanted = [1.0 if m in fixed else free * score / rest if rest else 1.0 for m, score in enumerate(scores)]
        if all(share >= 1 for share in wanted):
            break
        fixed |= {m for m, share in enumerate(wanted) if share < 1}
    given = [int(share) for share in wanted]
    for m in sorted(range(len(parts)), key=lambda m: (given[m] - wanted[m], m))[: units - sum(given)]:
        given[m] += 1
    for part, jobs in zip(parts, given, strict=True):
        part["target"] = rho * jobs


def variance(recent, lr):
    """How far a task's last differences are from their mean, relative to it, for a squared step of lr tau."""
    deltas = torch.stack([one["delta"].flat for one in recent])
    mean, tau = deltas.mean(0), sum(one["steps"] for one in recent) / len(recent)
    spread = float((deltas - mean).square().sum(1).mean() / mean.square().sum().clamp(min=1e-30))
    return spread / (lr * tau) ** 2
