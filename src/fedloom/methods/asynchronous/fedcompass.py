"""FedCompass."""

from copy import deepcopy
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated

from fedloom.cohort import Each, Replies, Reply
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.asynchronous._arrival import assigned, left_by
from fedloom.ops.overlap import apply_update, discount_by_staleness, idle_up_to_cohort, seconds_a_step, update_message
from fedloom.ranges import LearningRate, Linear, Log

GENERAL = -1  # the buffer of those who come late for their group


@dataclass(frozen=True)
class FedCompass(Method):
    """Can the server choose every client's number of steps so that groups of them end together?

    Li, Chaturvedi, He, Chen, Singh, Kindratenko, Huerta, Kim, Madduri: FedCompass: Efficient Cross-Silo Federated
    Learning on Heterogeneous Client Devices using a Computing Power Aware Scheduler, ICLR 2024, arXiv 2309.14675.

        client i:  Q_i steps of SGD from w;  send w_i - w
        arrival:   s_i <- 0.1 s_i + 0.9 (seconds a step);   in time for its group: wait
                   late: into the general buffer, begin anew at once
        group:     when all its members are there, or at its T_max:  w <- w + sum alpha_i delta_i, buffer included
                   alpha_i = alpha (1 + staleness)^-a n_i / sum n;   its members begin anew, the fastest first
        begin:     join the group with the most steps until its T_a, Qmin <= steps <= Qmax, or found a new one, whose
                   T_a = now + Q s_i and T_max = now + lambda Q s_i, near another's T_max + Qmax min s

    Departures:
    1. Clients take SGD steps (the official code: Adam), and are weighted by samples (there: equally).
    2. Staleness weakens; the official code's exponent has the wrong sign.
    3. Running statistics of BatchNorm go toward the group's mean, by its share of the samples.
    4. A client whose speed nobody knows is a group of its own, with Qmax steps. A round is one step of the server.
    5. A client whose work was lost leaves its group and begins anew in the next round.

    Identities: alpha=1, Qmin=Qmax and clients of one speed are FedAvg from the second step of each on.
    """

    lr: LearningRate = 0.05  # local learning rate; the paper takes Adam with 1e-3
    batch: int = 10  # local batch size; the paper takes 64 or 128
    fewest: int = 20  # Q_min, as in the official configuration (so are the next fields)
    alpha: Annotated[float, Linear(0.3, 1.0)] = 0.9  # alpha
    most: Annotated[int, Log(20, 200)] = 100  # Q_max
    latest: float = 1.5  # lambda: T_max is that much later than T_a
    decay: float = 0.5  # a: of staleness
    memory: float = 0.9  # share of the newest measurement in a client's speed

    compressible = ("delta",)
    private = ("delta",)
    light = {"fewest": 3, "most": 12}

    def __post_init__(self):
        Method.__post_init__(self)
        if not 1 <= self.fewest <= self.most or self.latest < 1:
            raise UsageError("fedcompass needs 1 <= fewest <= most, and latest of at least 1")

    def setup(self, server, clients):
        server.version = 0
        server.held = []  # uploads that nobody has used yet: client, fields, version of the model, group
        server.plan = {"groups": {}, "speed": {}, "jobs": {}, "ready": [], "founded": 0}

    def round(self, server, cohort):
        plan, held = deepcopy(server.plan), list(server.held)
        waiting = {*plan["ready"], *(one["client"] for one in held if one["group"] != GENERAL)}
        idle = idle_up_to_cohort(cohort.where(lambda k: k not in waiting), server.rng("idle"))
        self.begin(server, cohort, plan, [*plan["ready"], *idle])
        plan["ready"], done = [], None
        while done is None and cohort.working:
            filling = {g: group["latest"] for g, group in plan["groups"].items() if group["arrived"]}
            left = max(0.0, min(filling.values()) - cohort.now) if filling else None
            ended = cohort.wait(1, deadline=left)
            if not ended.asked:
                done = min(filling, key=filling.get)  # its time is over
            for k in ended.missing:
                done = left_by(plan, k)
            for reply in ended:
                done = self.arrive(server, cohort, plan, held, reply)
        if done is not None:
            used = [one for one in held if one["group"] in (done, GENERAL)]
            held = [one for one in held if one["group"] not in (done, GENERAL)]
            self.step(server, cohort, sorted(used, key=itemgetter("client")))
            plan["ready"] = sorted(plan["groups"][done]["arrived"], key=plan["speed"].get)
            plan["groups"][done] |= {"due": 0.0, "latest": 0.0, "arrived": []}  # who is missing comes late
            if not plan["groups"][done]["members"]:
                del plan["groups"][done]
        server.plan, server.held = plan, held

    def begin(self, server, cohort, plan, clients):
        """Gives clients work, and a group whose other members end at the same time."""
        steps = {}
        for k in clients:
            steps[k], group = assigned(plan, k, cohort.now, self.fewest, self.most, self.latest)
            plan["jobs"][k] = {"steps": steps[k], "version": server.version, "group": group}
        if clients:
            cohort.clients_by_id(clients).submit(self.local, model=server.model, steps=Each(steps))

    def arrive(self, server, cohort, plan, held, reply):
        """Takes a reply in; gives the group that is complete with it."""
        k, job = reply.client, plan["jobs"][reply.client]
        took = seconds_a_step(reply, job["steps"])
        plan["speed"][k] = (1 - self.memory) * plan["speed"].get(k, took) + self.memory * took
        late = cohort.now > plan["groups"][job["group"]]["latest"]
        group = GENERAL if late else job["group"]
        held.append({"client": k, "fields": reply.fields, "version": job["version"], "group": group})
        if not late:
            plan["groups"][group]["arrived"].append(k)
        done = left_by(plan, k)
        if late:
            self.begin(server, cohort, plan, [k])
        return done

    def step(self, server, cohort, used):
        """Takes what clients sent into the model."""
        ages = [server.version - one["version"] for one in used]  # a late client may have sent more than one
        replies = Replies([Reply(i, used[i]["fields"], age) for i, age in enumerate(ages)], range(len(used)))
        up = discount_by_staleness(replies, self.decay).mean(weight="n")
        share = min(1.0, up.weight / sum(cohort.info(k)["n"] for k in cohort))
        server.model = apply_update(server.model, up, self.alpha * share, share)
        server.version = server.version + 1
        server.log(group=len(used), staleness=sum(reply.staleness for reply in replies) / len(used))

    @client
    def local(self, client, model, steps):
        w, _ = client.descend(model, lr=self.lr, steps=steps, batch=self.batch)
        return {**update_message(w, model), "n": client.n}
