"""A privacy statement never says more than holds: sensitivities and noise by experiment, epsilon by other means."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from problems import ran
from scipy.stats import norm

from fedloom.boundary import Boundary
from fedloom.boundary.pipeline import Pipeline
from fedloom.boundary.privacy import accountant
from fedloom.boundary.privacy import build as build_privacy
from fedloom.boundary.privacy.base import Privacy
from fedloom.cohort import Cohort
from fedloom.engines.serial import Serial
from fedloom.errors import RunError, UsageError
from fedloom.method import Method, build, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Server
from fedloom.registry import catalogue
from fedloom.runs.act import acting
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.tasks.toy import Toy
from fedloom.testing.lab import Lab
from fedloom.world import World

pytest.importorskip("dp_accounting", reason="the extra fedloom[dp] is not installed")

METHODS = [
    entry.name for entry in catalogue() if isinstance(p := getattr(entry.load(Method), "private", ()), tuple) and p
]
EQUAL = Toy(sizes=(20,) * 6)
FEW = Toy(sizes=(10,) * 3)


def privacy(text, method, task):
    return build_privacy(text, replace(Spec(), dp=text), method, task)


def played(method, task, made, without=()):
    """The first round of a method under some privacy, of all clients but some, from one and the same start."""
    pipeline = Pipeline((made,))
    site, engine = Site(task, 0, layers=pipeline.layers, networks=method.networks, needs=method.needs), Serial()
    boundary = Boundary(method, site, World(task.population), engine, pipeline)
    everybody = Cohort(range(task.population), boundary)
    server = Server(site, task.population)
    engine.start(method, site, {})
    server.plan_rounds(2 if method.scheduled else None)
    for kind, round in (("setup", 0), ("train", 1)):
        with acting(boundary, server, kind, round):
            if kind == "setup":
                method.setup(server, everybody)
            else:
                method.round(server, everybody.where(lambda k: k not in without))
    return boundary


def flat(fields, names):
    values = [fields[name] for name in names if name in fields]
    return torch.cat([getattr(value, "flat", value).double().reshape(-1) for value in values])


# Clients.


@pytest.mark.parametrize("name", METHODS)
def test_large_noise_moves_what_is_private_and_the_statement_names_all_else(name):
    method = build(name)
    task = Lab(method).toy()
    for dp in ("client:noise=5,clip=1", "local:gaussian,epsilon=0.5"):
        try:
            made = privacy(dp, method, task)
        except UsageError as refused:  # it takes no mean at all, or one a group
            grouped = dp.startswith("client") and any(call.verb == "means" for call in method.plan)
            assert ("takes a mean a group" if grouped else "asks for each reply") in str(refused)
            continue
        boundary = played(method, task, made)
        sent = {(line["function"], line["field"]) for line in lines(boundary) if line["direction"] == "up"}
        functions = {use["function"]: use["verb"] for use in boundary.books.verbs.values()}
        open_ = {
            f"{function}.{field}"
            for function, field in sent
            if field != "envelope"
            and (field not in method.private or ("client" in dp and functions[function] != "mean"))
        }
        told = made.statement(boundary.books)[0]
        assert ("no guarantee" in told) >= bool(open_)
        assert all(what in told for what in open_)
        assert not any(field == "n" for function, field in sent if functions[function] == "mean")


def lines(boundary):
    return boundary.books.ledger.close()[0]


def test_a_sum_gets_noise_on_every_private_field_and_on_nothing_else():
    method, z, bound = build("scaffold", {"lr": 1e-9}), 4.0, 0.5
    quiet, loud = (ran(method, EQUAL, 1, dp=f"client:noise={noise},clip={bound}").server for noise in (0, z))
    drawn = [(loud.model - quiet.model).flat, (loud.control - quiet.control).flat]
    for noise in drawn:
        assert float(noise.std()) == pytest.approx(z * bound / 6, rel=0.2)
    assert not torch.allclose(drawn[0], drawn[1])


# Samples.


@dataclass(frozen=True)
class Early(FedAvg):
    """Looks at the data before training."""

    early: bool = True

    def setup(self, server, clients):
        if self.early:
            clients.call(self.before)

    @client
    def before(self, client):
        client.state["mean"] = client.data.x.mean()


def test_what_a_client_learns_in_setup_voids_the_guarantee_of_samples():
    told = ran(Early(), EQUAL, rounds=1, dp="sample:noise=1").manifest["dp"][0]
    assert "no guarantee" in told and "what before learns in setup leaves" in told
    assert "epsilon" in ran(Early(early=False), EQUAL, rounds=1, dp="sample:noise=1").manifest["dp"][0]


def test_the_noise_of_samples_reaches_the_model_at_the_stated_scale():
    task, z, bound = Toy(sizes=(10,)), 40.0, 0.1
    steps = []
    for seed in range(6):
        made = ran(FedAvg(lr=1.0, batch=0), task, 1, seed=seed, dp=f"sample:noise={z},clip={bound}")
        steps.append((made.server.model - made.site.initial).flat)
    noise = torch.cat(steps)
    assert float(noise.std()) == pytest.approx(z * bound / 10, rel=0.1)


def test_attackers_poison_their_samples_under_the_guard_too():
    made = ran(FedAvg(), EQUAL, 1, dp="sample:noise=0.5", attack="label_flip:0.5")
    plain = ran(FedAvg(), EQUAL, 1, dp="sample:noise=0.5")
    assert not torch.equal(made.server.model.flat, plain.server.model.flat)


# What goes out of hand.


@dataclass(frozen=True)
class Finishing(FedAvg):
    """Asks for something more once training is over."""

    def setup(self, server, clients):
        server.total = None

    def finish(self, server, clients):
        server.total = float(sum(reply.sum for reply in clients.call(self.told)))

    @client
    def told(self, client):
        return {"sum": float(client.data.x.sum())}


@dataclass(frozen=True)
class Sending(FedAvg):
    """Sends a field that it does not declare."""

    @client
    def local(self, client, model):
        return FedAvg.local(self, client, model) | {"mean": model.flat.mean()}


@pytest.mark.parametrize(
    "dp", ["client:noise=30,clip=1,epsilon=100", "local:laplace,epsilon=1,budget=50", "sample:noise=9,epsilon=50"]
)
def test_what_is_sent_beside_is_refused_before_the_first_round(dp):
    with pytest.raises(UsageError, match="told by call in finish, which this mechanism does not protect"):
        ran(Finishing(), EQUAL, rounds=2, dp=dp)
    with pytest.raises(UsageError, match=r"local\.mean leaves the clients unprotected"):
        ran(Sending(), EQUAL, rounds=2, dp=dp)


@dataclass(frozen=True)
class Observing(FedAvg):
    """Trains on what it has seen in evaluation."""

    kept: bool = True

    def setup(self, server, clients):
        server.seen = 1.0

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta * server.seen

    def observe(self, server, clients):
        seen = sum(reply.sum for reply in clients.call(self.look))
        if self.kept:
            server.seen = seen
        server.log(seen=seen)

    @client
    def look(self, client):
        return {"sum": float(client.data.x.sum())}


@pytest.mark.parametrize("dp", ["client:noise=30,clip=1", "local:laplace,epsilon=1", "sample:noise=9"])
def test_what_evaluation_leaves_at_the_server_voids_the_guarantee(dp):
    made = ran(Observing(), EQUAL, rounds=2, dp=dp)
    assert "no guarantee, since server.seen, set in evaluation, leaves the clients" in made.manifest["dp"][0]
    assert not any("dp/epsilon" in row for row in made.record.metrics)
    with pytest.raises(UsageError, match=r"server\.seen, set in evaluation, leaves the clients unprotected"):
        ran(Observing(), EQUAL, rounds=2, dp=f"{dp},{'budget' if 'local' in dp else 'epsilon'}=90")
    assert "epsilon" in ran(Observing(kept=False), EQUAL, rounds=2, dp=dp).manifest["dp"][0]


def test_what_evaluation_leaves_late_ends_a_run_with_a_budget():
    @dataclass(frozen=True)
    class Later(FedAvg):
        def observe(self, server, clients):
            if server.round > 3:
                server.model = 2.0 * server.model

    with pytest.raises(RunError, match=r"server\.model, set in evaluation, leaves the clients unprotected"):
        ran(Later(), EQUAL, rounds=6, eval_every=1, dp="client:noise=30,clip=1,epsilon=90")


@dataclass(frozen=True)
class Named(FedAvg):
    """Calls a field of its own as an adaptive bound calls its bit."""

    @client
    def local(self, client, model):
        return FedAvg.local(self, client, model) | {"within": float(client.data.x.mean())}


def test_a_field_that_is_called_as_one_of_the_mechanism_is_protected_only_where_that_one_is_sent():
    with pytest.raises(UsageError, match=r"local\.within leaves the clients unprotected"):
        ran(Named(), EQUAL, rounds=1, dp="client:noise=30,clip=1,epsilon=100")
    with pytest.raises(UsageError, match=r"local\.within leaves the clients unprotected"):
        ran(Named(), EQUAL, rounds=1, dp="local:gaussian,epsilon=1,budget=50")
    sent = []

    @dataclass(frozen=True)
    class Listening(Named):
        def round(self, server, cohort):
            sent.append(cohort.mean(self.local, model=server.model).fields)

    ran(Listening(), EQUAL, rounds=1, dp="client:noise=30,clip=adaptive,epsilon=100")
    assert all("within" not in fields for fields in sent) and sent


@dataclass(frozen=True)
class Prepared(Sending):
    """Needs in a round what its setup has put down."""

    def setup(self, server, clients):
        server.start = server.model

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.start)
        server.model = server.start + up.delta


@pytest.mark.parametrize("dp", ["client:noise=30,clip=1,epsilon=100", "local:laplace,epsilon=1,budget=50"])
def test_what_is_sent_beside_after_a_setup_is_refused_before_the_first_round_too(dp):
    with pytest.raises(UsageError, match=r"local\.mean leaves the clients unprotected"):
        ran(Prepared(), EQUAL, rounds=2, dp=dp)


def test_without_a_budget_no_round_claims_what_finish_will_void():
    made = ran(Finishing(), EQUAL, rounds=2, dp="client:noise=1")
    assert not any("dp/epsilon" in row for row in made.record.metrics)
    assert "no guarantee" in made.manifest["dp"][0] and "told.sum" in made.manifest["dp"][0]


@dataclass(frozen=True)
class Growing(FedAvg):
    """Takes more of its budget from its fourth round on."""

    several: bool = False  # more sums, rather than more steps

    def round(self, server, cohort):
        late = server.round > 3
        for _ in range(3 if late and self.several else 1):
            up = cohort.mean(self.longer, weight="n", model=server.model, epochs=4 if late and not self.several else 1)
            server.model = server.model + up.delta

    @client
    def longer(self, client, model, epochs):
        w, _ = client.descend(model, lr=self.lr, epochs=epochs, batch=self.batch)
        return {"delta": w - model, "n": client.n}


@pytest.mark.parametrize(
    ("dp", "several"),
    [
        ("sample:noise=1.1,clip=1", False),
        ("client:noise=3,clip=1", True),
        ("local:laplace,epsilon=0.5", True),
        ("local:gaussian,epsilon=0.5", True),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_round_that_takes_more_than_any_before_is_given_up_rather_than_overdraw(dp, several, workers):
    method = Growing(several=several)
    engine = {"engine": "pool", "workers": workers} if workers else {}
    free = [row["dp/epsilon"] for row in ran(method, EQUAL, 4, dp=dp).record.metrics]
    last = ran(FedAvg(), EQUAL, 4, dp=dp).record.metrics[-1]["dp/epsilon"]  # as the fourth round would have cost
    assert last < free[3]
    budget = (last + free[3]) / 2
    made = ran(method, EQUAL, 9, dp=f"{dp},{'budget' if 'local' in dp else 'epsilon'}={budget}", **engine)
    spent = [row["dp/epsilon"] for row in made.record.metrics]
    assert len(spent) == 4 and max(spent) <= budget
    assert "the privacy budget" in made.record.metrics[3]["note"] and made.manifest["status"] == "finished"
    assert "the privacy budget" in made.manifest["stopped_because"]
    three = ran(method, EQUAL, 3, dp=dp)
    if not several:
        assert torch.equal(made.server.model.flat, three.server.model.flat)


# Epsilon, a second time.


def exact(mu, delta):
    """Epsilon of one Gaussian release whose mean moves by mu deviations (Balle, Wang 2018, equation 6)."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        spent = norm.cdf(mu / 2 - middle / mu) - math.exp(middle + norm.logcdf(-mu / 2 - middle / mu))
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def integrated(p, q, rounds, delta, step=2e-3, reach=60.0):
    """Epsilon of as many releases of a pair of mixtures [(weight, mean)] of deviation 1, by FFT of their losses.

    Losses are rounded to the nearest step, so that the error is no bias.
    """
    x = np.linspace(-40, 40, 800_001)
    density = [sum(w * norm.pdf(x, m) for w, m in mixture) for mixture in (p, q)]
    log = [np.logaddexp.reduce([math.log(w) + norm.logpdf(x, m) for w, m in mixture], axis=0) for mixture in (p, q)]
    loss, mass = log[0] - log[1], density[0] * (x[1] - x[0])
    size = int(2 * reach / step)
    places = np.clip(np.rint(loss / step).astype(int), -size // 2, size // 2 - 1)
    one = np.bincount(places % size, weights=mass, minlength=size)
    many = np.fft.irfft(np.fft.rfft(one / one.sum()) ** rounds, n=size).clip(0)
    at = np.where(np.arange(size) < size // 2, np.arange(size), np.arange(size) - size) * step
    low, high = 0.0, reach / 2
    for _ in range(60):
        middle = (low + high) / 2
        over = at > middle
        spent = float((many[over] * -np.expm1(middle - at[over])).sum())
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


@pytest.mark.parametrize(("z", "size", "population", "rounds"), [(1.0, 10, 100, 20), (0.8, 5, 50, 5), (2.0, 3, 6, 10)])
def test_epsilon_of_poisson_samples_is_a_close_upper_bound_of_the_integrated_one(z, size, population, rounds):
    share, at = size / population, 1 / z
    mixed, still = [(1 - share, 0.0), (share, at)], [(1.0, 0.0)]
    true = max(integrated(mixed, still, rounds, 1e-5), integrated(still, mixed, rounds, 1e-5))
    mine = accountant.epsilon(z, {1: rounds}, 1e-5, "poisson", size, population)
    assert true <= mine < 1.35 * true


@pytest.mark.parametrize(("z", "size", "population", "rounds"), [(2.0, 10, 100, 10), (1.5, 3, 6, 4)])
def test_epsilon_of_cohorts_of_a_fixed_size_covers_one_client_replaced(z, size, population, rounds):
    method, task = FedAvg(), Toy(sizes=(8,) * population)
    made = build_privacy(f"client:noise={z},clip=1", Spec(cohort=size, rounds=rounds), method, task)
    mine = made.spending({"sums": {f"x{1}": rounds}})
    share = size / population
    # Its reply is the bound in one direction in one world, in the opposite one in the other.
    ours, its = [(1 - share, 0.0), (share, 1 / z)], [(1 - share, 0.0), (share, -1 / z)]
    assert integrated(ours, its, rounds, 1e-5) <= mine < 60


def test_epsilon_of_samples_is_that_of_opacus():
    opacus = pytest.importorskip("opacus.accountants")
    made = privacy("sample:noise=1.1,clip=1", FedAvg(batch=5), EQUAL)
    for steps in (1, 40, 200):
        theirs = opacus.RDPAccountant()
        theirs.history = [(1.1, 5 / 20, steps)]
        mine = made.spending({"steps": {"2": steps, "0": steps // 2}})
        assert mine == pytest.approx(theirs.get_epsilon(1e-5), rel=0.02)
    assert made.most(20, mine) == 200 and made.most(20, mine * 0.999) == 199


@pytest.mark.parametrize(("epsilon", "clip"), [(1.0, 1.0), (3.0, 0.25)])
@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
def test_local_noise_gives_each_reply_its_epsilon(mechanism, epsilon, clip):
    """From the replies that arrive: whatever a client's data, two replies are as far apart as twice the bound."""
    task = Toy(sizes=(10,) * 12)
    dp = f"local:{mechanism},epsilon={epsilon},clip={clip}"
    steps = [
        (made := ran(FedAvg(lr=1e-9), task, 1, seed=seed, dp=dp)).server.model - made.site.initial for seed in range(12)
    ]
    deviation = float(torch.cat([step.flat for step in steps]).double().std()) * 12**0.5
    if mechanism == "laplace":
        assert 2 * clip / (deviation / 2**0.5) == pytest.approx(epsilon, rel=0.1)
    else:
        assert 0.8 * epsilon < exact(2 * clip / deviation, 1e-5) < 1.05 * epsilon
    made = privacy(dp, FedAvg(), task)
    assert made.clip == clip
    if mechanism == "laplace":
        assert made.scale == pytest.approx(2 * clip / epsilon)
    else:
        assert 0.8 * epsilon < exact(2 * clip / made.scale, 1e-5) <= epsilon


@pytest.mark.parametrize("rounds", [1, 6])
def test_the_epsilon_of_gaussian_replies_is_little_above_that_of_their_densities(rounds):
    made = ran(FedAvg(), EQUAL, rounds, dp="local:gaussian,epsilon=1,clip=0.5")
    scale = made.pipeline.one(Privacy).scale
    true = exact(2 * 0.5 * rounds**0.5 / scale, 1e-5)  # k replies are one whose mean moves sqrt(k) times as far
    assert true <= made.record.metrics[-1]["dp/epsilon"] <= 1.35 * true


def test_the_epsilon_of_single_replies_is_that_of_who_replied_most():
    made = ran(FedAvg(), EQUAL, rounds=6, cohort=2, dp="local:laplace,epsilon=0.5")
    replies = made.boundary.books.memory["privacy"]["replies"]
    assert sum(replies.values()) == 12 and max(replies.values()) < 6
    assert made.record.metrics[-1]["dp/epsilon"] == 0.5 * max(replies.values())


def test_a_leak_that_only_the_real_problem_shows_still_ends_a_run_with_a_budget():
    with pytest.raises(RunError, match=r"local.late leaves the clients unprotected"):
        ran(Late(), EQUAL, rounds=9, dp="client:noise=30,clip=1,epsilon=90")


@dataclass(frozen=True)
class Late(FedAvg):
    """Sends something more from its fifth round on."""

    @client
    def local(self, client, model):
        return FedAvg.local(self, client, model) | ({"late": 1.0} if client.round > 4 else {})
