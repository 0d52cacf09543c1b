"""Every method passes the contract, and every check of the contract can fail."""

import inspect
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fedloom import testing
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.registry import catalogue
from fedloom.testing import CHECKS, ContractError, Lab, check_method
from fedloom.vector import Vector

LABS: dict[str, Lab] = {}


def together(entry):
    """One worker does all checks of a method, which share runs."""
    return pytest.param(entry.name, marks=pytest.mark.xdist_group(entry.name))


@pytest.mark.parametrize("check", CHECKS, ids=testing.title)
@pytest.mark.parametrize("name", [together(entry) for entry in catalogue()])
def test_contract(name, check):
    if name not in LABS:
        LABS.clear()  # one method's traces at a time
        LABS[name] = Lab(next(entry for entry in catalogue() if entry.name == name).load(Method))
    check(LABS[name])


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
def test_form_of_a_methods_file(entry):
    lines = entry.path.read_text().splitlines()
    assert len(lines) <= 150, "a method's file has at most 150 lines"
    assert entry.question.endswith("?"), "the docstring begins with the question that the method answers"
    assert "Departures:" in entry.doc and "Identities:" in entry.doc
    assert all(comment for _, _, _, comment in entry.fields()), "every field has the paper's symbol beside it"
    assert entry.load(Method).name() == entry.name


# Methods that break one rule each. Fields and rounds are FedAvg's.


@dataclass(frozen=True)
class NoDefault(Method):
    lr: float  # a field without a default


@dataclass(frozen=True)
class Lightly(FedAvg):
    light: ClassVar[dict] = {"epoch": 1}  # a slip: the field is called epochs


@dataclass(frozen=True)
class Unwired(FedAvg):
    hidden: ClassVar[dict] = {}  # a client value that reaches the server through a shared object

    def round(self, server, cohort):
        cohort.call(self.local, model=server.model)
        server.model = self.hidden.pop("model")

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        self.hidden["model"] = w


@dataclass(frozen=True)
class Careless(FedAvg):
    unseeded: ClassVar[torch.Generator] = torch.Generator()  # draws that no key names

    @client
    def local(self, client, model):
        noise = torch.randn(model.layout.size, generator=self.unseeded)
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        return {"delta": (w - model).where(noise > -1), "n": client.n}


@dataclass(frozen=True)
class Deterministic(FedAvg):
    def setup(self, server, clients):
        server.model = server.model.zeros_like() + 0.1

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, steps=1)
        return {"delta": w - model, "n": client.n}


@dataclass(frozen=True)
class Marking(FedAvg):
    seen: ClassVar[list] = []  # evaluation that leaves a mark on training

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr * (1 + 0.1 * len(self.seen)), batch=self.batch)
        return {"delta": w - model, "n": client.n}

    @client
    def predict(self, client, model):
        self.seen.append(client.id)
        return model


@dataclass(frozen=True)
class Interleaved(FedAvg):
    last: ClassVar[list] = [None]  # who began last: another client, where all wait for each other

    @client
    def local(self, client, model):
        self.last[0] = client.id
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        return {"delta": (w - model) * float(self.last[0] == client.id), "n": client.n}


@dataclass(frozen=True)
class Forgetful(FedAvg):
    rounds_done: ClassVar[dict] = {}  # memory that no checkpoint keeps

    def round(self, server, cohort):
        done = self.rounds_done.setdefault(id(server), 0)
        self.rounds_done[id(server)] = done + 1
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta * (1 + done)


@dataclass(frozen=True)
class Unprepared(FedAvg):
    """Makes a second network known in `setup` alone, and at clients: a server that is resumed does not know it."""

    def setup(self, server, clients):
        server.other = server.network("mlp:4")

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.net(server.other)
        server.model = server.model + up.delta

    @client
    def local(self, client, model):
        client.network("mlp:4")
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        return {"delta": w - model, "n": client.n}


@dataclass(frozen=True)
class Scribbling(FedAvg):
    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        delta = w - model
        model.flat.mul_(0.5)
        return {"delta": delta, "n": client.n}


@dataclass(frozen=True)
class Remembering(FedAvg):
    @client
    def local(self, client, model):
        last = client.state.get("last")
        if last is not None:
            last.flat.add_(1)
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        client.state["last"] = w
        return {"delta": w - model, "n": client.n}


@dataclass(frozen=True)
class Closed(FedAvg):
    """What it judges at a client is what training has left there."""

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        client.state["mine"] = w
        return {"delta": w - model, "n": client.n}

    @client
    def predict(self, client, model):
        return client.state["mine"]


@dataclass(frozen=True)
class Counting(FedAvg):
    """Trains by how many are still to come."""

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + (1 + server.task.newcomers) * up.delta


@dataclass(frozen=True)
class Roundabout(FedAvg):
    def round(self, server, cohort):
        ask = cohort.mean
        up = ask(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta


@dataclass(frozen=True)
class ByHand(FedAvg):
    """Averages by hand what it has asked for in a way that its text does not show, and sends whole numbers."""

    def round(self, server, cohort):
        ask = cohort.call
        replies = ask(self.local, model=server.model)
        mean = sum(r.bits.to(torch.int64) for r in replies).double() / len(replies) / 2**20
        server.model = server.model + Vector(mean.float(), server.model.layout)

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        return {"bits": ((w - model).flat * 2**20).to(torch.int64)}


@dataclass(frozen=True)
class Boasting(ByHand):
    """Declares what it does not send."""

    compressible = ("delta",)
    private = ("delta",)


@dataclass(frozen=True)
class Unforgetting(FedAvg):
    worked: ClassVar[Counter] = Counter()  # what its clients remember whether or not their reply counted

    def setup(self, server, clients):
        self.worked.clear()

    @client
    def local(self, client, model):
        self.worked[client.id] += 1
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        return {"delta": (w - model) / self.worked[client.id], "n": client.n}


@dataclass(frozen=True)
class Echoing(FedAvg):
    @client
    def local(self, client, model):
        return {"delta": model, "n": client.n}


@dataclass(frozen=True)
class Strict(FedAvg):
    def round(self, server, cohort):
        replies = cohort.call(self.local, model=server.model)
        server.model = server.model + sum((r.delta for r in replies[1:]), replies[0].delta) / len(replies)


@dataclass(frozen=True)
class Doubting(FedAvg):
    @client
    def local(self, client, model):
        scale = client.data.x.std(0).mean()  # not a number with one sample
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        return {"delta": (w - model) * scale, "n": client.n}


@dataclass(frozen=True)
class Narrow(FedAvg):
    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        return {"delta": w - model.params, "n": client.n}


@dataclass(frozen=True)
class Idle(FedAvg):
    def round(self, server, cohort):
        cohort.mean(self.local, weight="n", model=server.model)


@dataclass(frozen=True)
class Leaking(FedAvg):
    @client
    def local(self, client, model):
        return {"delta": LeakyNumber.kept_delta(model), "n": client.n}


class LeakyNumber:
    kept: ClassVar[list] = []

    @classmethod
    def kept_delta(cls, model):
        delta = model.zeros_like()
        cls.kept.append(delta.flat)
        return delta


@dataclass(frozen=True)
class Late(FedAvg):
    def round(self, server, cohort):
        FedAvg.round(self, server, cohort)
        ask = cohort.call
        ask(self.local, model=server.model)


@dataclass(frozen=True)
class Undeclaring(FedAvg):
    def round(self, server, cohort):
        FedAvg.round(self, server, cohort)
        if len(cohort) > 1000:
            server.large = True


@dataclass(frozen=True)
class Deaf(FedAvg):
    @client
    def local(self, client, model):
        return FedAvg.local(self, client, client.initial)


def under(setting):
    return next(check for check in CHECKS if check.__name__ == f"check_under_{setting}")


@dataclass(frozen=True)
class Wavering(FedAvg):
    def phases(self, server):
        return [("warm", 1 + int(server.round > 0)), ("on", None)]  # the warm-up grows as it goes on


@dataclass(frozen=True)
class Sorting(FedAvg):
    """Counts its labels, and does not say that it needs some."""

    @client
    def local(self, client, model):
        torch.bincount(client.data.y)
        return FedAvg.local(self, client, model)


@dataclass(frozen=True)
class Featured(FedAvg):
    """Looks at features, and does not say that it needs a head behind them."""

    @client
    def local(self, client, model):
        client.features(model, client.data.x)
        return FedAvg.local(self, client, model)


BROKEN = [
    (testing.check_frozen, NoDefault, "default"),
    (testing.check_frozen, Lightly, "light names epoch, which is no field of Lightly"),
    (testing.check_repeats, Careless, "two runs with one seed differ"),
    (testing.check_repeats, Deterministic, "two seeds"),
    (testing.check_client_order, Unwired, "order"),
    (testing.check_pool, Unwired, "KeyError: 'model'"),
    (testing.check_vectorized, Interleaved, "more than rounding"),
    (testing.check_evaluation_changes_nothing, Marking, "evaluating less often"),
    (testing.check_resume, Forgetful, "resumed on serial"),
    (testing.check_resume, Unprepared, "no network here has the layout"),
    (testing.check_messages_untouched, Scribbling, "changed its arguments"),
    (testing.check_messages_untouched, Remembering, "remembered value in place"),
    (testing.check_messages_untouched, Echoing, "gave an argument back"),
    (testing.check_newcomers, Closed, "a newcomer, whose state is empty, cannot be judged"),
    (testing.check_newcomers, Counting, "newcomers are noticed by those who train"),
    (testing.check_regression, Sorting, "declare by_class = True"),
    (testing.check_regression, Idle, "no better than that of always the mean"),
    (testing.check_headless, Featured, "declare by_head = True"),
    (testing.check_plan, Roundabout, "cannot be read from its text"),
    (testing.check_phases, Wavering, "warm from round 1, on from round 2 before a run and .* on from round 3 after it"),
    (testing.check_declared_values, Undeclaring, r"round sets server\.large, which setup does not declare"),
    (under("the_median"), ByHand, "is refused only after"),
    (under("attack_sign_flip"), ByHand, "has no effect"),
    (under("topk"), Boasting, "as many bytes come up"),
    (under("secure_sums"), Late, "refused only after mean local has run"),
    (under("sums_in_the_air"), Late, "refused only after mean local has run"),
    (under("noise_on_the_way_up"), Idle, "has no effect"),
    (under("noise_on_the_way_down"), Deaf, "has no effect"),
    (testing.check_lost_clients, Strict, "index out of range"),
    (testing.check_lost_is_unasked, Unforgetting, "remembers what did not count"),
    (testing.check_small_cohorts, Doubting, "a client with one sample|client 0"),
    (testing.check_batch_norm, Narrow, "layouts"),
    (testing.check_constant_memory, Leaking, "alive"),
    (testing.check_learns, Idle, "after"),
]


@pytest.mark.parametrize(("check", "method", "complaint"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_every_check_can_fail(check, method, complaint):
    with pytest.raises(ContractError, match=complaint):
        check_method(method, [check])


def test_light_fields_are_tried_but_learning_is_at_the_defaults():
    @dataclass(frozen=True)
    class Short(FedAvg):
        lr: float = 0.1
        light: ClassVar[dict] = {"lr": 0.0}  # with which it would learn nothing

    lab = Lab(Short)
    assert (lab.method, lab.at_defaults.method) == (Short(0.0), Short())
    testing.check_learns(lab)
    assert Lab(Short()).at_defaults.method == Lab(Short()).method == Short()
    with pytest.raises(ContractError):
        testing.check_learns(Lab(Short(0.0)))


def test_loopback_sees_what_a_wire_would_lose():
    # Serial hands the very object over; over a wire a copy arrives, and the identity is gone.
    @dataclass(frozen=True)
    class Same(FedAvg):
        sent: ClassVar[list] = []

        def round(self, server, cohort):
            self.sent[:] = [server.model.flat.data_ptr()]
            super(type(self), self).round(server, cohort)

        @client
        def local(self, client, model):
            w, _ = client.descend(model, lr=self.lr, batch=self.batch)
            return {"delta": (w - model) * float(model.flat.data_ptr() in self.sent), "n": client.n}

    with pytest.raises(ContractError, match="loopback differ"):
        check_method(Same, [testing.check_loopback])


def test_payload_check_weighs_the_real_bytes(monkeypatch):
    from fedloom import encoding

    honest = encoding.sizes
    monkeypatch.setattr(encoding, "sizes", lambda fields: honest(fields) | {"envelope": 1})
    with pytest.raises(ContractError, match="ledger counts"):
        check_method(FedAvg, [testing.check_payload_bytes])


HEADER = (
    "from dataclasses import dataclass\n"
    "from fedloom.method import Method, client\n"
    "from fedloom.ranges import LearningRate, Positive\n"
)
GOOD = inspect.getsource(FedAvg)
FILES = [
    ("import random\n", GOOD, "import of random"),
    ("", GOOD + "\n    def __init__(self):\n        pass\n", "__init__"),
    ("", GOOD + "\n\ndef leak():\n    print(1)\n", "print"),
    ("", GOOD + "\n\ndef leak(x):\n    return x.cuda()\n", ".cuda"),
    ("import torch\n", GOOD + "\n\ntorch.manual_seed(0)\n", ".manual_seed"),
    ("x = 0\n", GOOD + "\n\ndef leak():\n    global x\n    x = 1\n", "global state"),
]


@pytest.mark.parametrize(("before", "text", "complaint"), FILES, ids=[f[2] for f in FILES])
def test_rules_of_a_users_file(tmp_path: Path, before, text, complaint):
    path = tmp_path / "mine.py"
    path.write_text(HEADER + before + text)
    from fedloom.registry import entry_of

    with pytest.raises(ContractError, match=complaint):
        check_method(entry_of(str(path)).load(Method), [testing.check_file_rules])


def test_a_users_good_file_passes_everything(tmp_path: Path):
    from fedloom.registry import entry_of

    path = tmp_path / "mine.py"
    path.write_text(HEADER + GOOD.replace("class FedAvg", "class Mine"))
    told = []
    check_method(entry_of(str(path)).load(Method), on_check=lambda name, problem, seconds: told.append((name, problem)))
    assert told == [(testing.title(check), None) for check in CHECKS]


def test_spec_round_trip_sees_a_field_that_changes(tmp_path: Path):
    from fedloom.registry import entry_of

    path = tmp_path / "growing.py"
    growing = "\n    def __post_init__(self):\n        object.__setattr__(self, 'lr', self.lr + 0.1)\n"
    path.write_text(HEADER + GOOD + growing)
    with pytest.raises(ContractError, match="comes back from a spec"):
        check_method(entry_of(str(path)).load(Method), [testing.check_spec_round_trip])
