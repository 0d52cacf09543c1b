"""Gradients, descent, batches and buffers of a node, against plain PyTorch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedloom.errors import CodecError, UsageError
from fedloom.evaluator import STATISTICS
from fedloom.node import Client, Server
from fedloom.site import Site
from fedloom.task import Data
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector


class Problem(Toy):
    """The toy data with a network of the test's own."""

    def __init__(self, network, sizes=(30, 1)):
        super().__init__(sizes)
        self.network = network

    def to(self, device):
        return self


class Hand(nn.Module):
    """A network written out in full, with an entry that the loss never touches."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3, bias=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Parts(nn.Module):
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x))


def norm():
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    return Parts(body, nn.Linear(8, 3))


def dropping():
    return Parts(nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5)), nn.Linear(32, 3))


def tied():
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    body[2].weight = body[0].weight
    return Parts(body, nn.Linear(6, 3))


def site(network=Hand, **settings):
    return Site(Problem(network), seed=0, **settings)


def client(at, state=None, nth=0, id=0):
    return Client(at, id, state or {}, "train", 1, nth)


def held(at, w):
    """A network of the test's own with the vector's values."""
    net = copy.deepcopy(at.task.network())
    net.load_state_dict({name: w[name].clone() for name in w}, strict=False)
    return net


def flattened(net, layout):
    state = net.state_dict()
    return torch.cat([state[name].reshape(-1) for name in layout.names])


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# grad


def by_hand(w, batch):
    """The gradient of the mean cross-entropy of `Hand`, written out."""
    hidden = torch.tanh(batch.x @ w["body.weight"].T + w["body.bias"])
    off = (hidden @ w["head.weight"].T).softmax(1) - F.one_hot(batch.y, 3)
    back = (off @ w["head.weight"]) * (1 - hidden**2) / len(batch)
    parts = {
        "body.weight": back.T @ batch.x,
        "body.bias": back.sum(0),
        "head.weight": off.T @ hidden / len(batch),
        "unused": torch.zeros(2),
    }
    return torch.cat([parts[name].reshape(-1) for name in w])


def test_grad_of_a_network_written_out():
    me = client(site())
    batch = me.data.all()
    w = me.initial
    g = me.grad(w, batch)
    assert g.layout == w.layout and not g.flat.requires_grad
    close(g.flat, by_hand(w, batch))
    assert (me.steps, me.samples) == (1, 30)
    close(me.logs["loss"][0], F.cross_entropy(held(me.site, w)(batch.x), batch.y))


@pytest.mark.parametrize("only", ["head.*", "body.*", "*bias", None])
def test_grad_of_some_parameters_is_zero_elsewhere(only):
    me = client(site(norm))
    batch, w = me.data.all(), me.initial
    whole, part = me.grad(w, batch), me.grad(w, batch, only=only)
    chosen = list(w.params) if only is None else [n for n in w.select(only) if n in list(w.params)]
    for name in w:
        expected = whole[name] if name in chosen else torch.zeros_like(whole[name])
        assert torch.equal(part[name], expected)
    assert whole.buffers.flat.eq(0).all() and whole.params.flat.ne(0).any()


def test_grad_of_a_loss_of_ones_own():
    def loss(net, batch):
        return net(batch.x).square().sum() + net.unused.sum()

    me = client(site())
    batch, w = me.data.all(), me.initial
    net = held(me.site, w)
    loss(net, batch).backward()
    close(me.grad(w, batch, loss=loss).flat, torch.cat([dict(net.named_parameters())[n].grad.reshape(-1) for n in w]))


def test_grad_moves_the_running_statistics_of_ones_own_vector_only():
    me = client(site(norm))
    batch = me.data.all()
    w = me.initial.clone()
    net = held(me.site, w).train()
    net(batch.x)
    me.grad(w, batch)
    close(w.flat, flattened(net, w.layout))
    came = Vector(me.initial.flat.clone(), w.layout, readonly=True)
    me.grad(came, batch)
    assert torch.equal(came.flat, me.initial.flat)


# descend


SGD = [
    {},
    {"epochs": 3},
    {"steps": 7},
    {"steps": 2},
    {"batch": None, "steps": 3},
    {"momentum": 0.9, "epochs": 2},
    {"weight_decay": 0.1, "epochs": 2},
    {"clip": 0.05},
    {"clip": 1e9},
    {"clip": 0.3, "momentum": 0.5, "weight_decay": 0.01, "epochs": 2},
    {"only": "head.*", "momentum": 0.9, "weight_decay": 0.1},
    {"correct": "vector", "epochs": 2},
    {"correct": "parameters"},
    {"correct": "function", "momentum": 0.9, "epochs": 2},
    {"correct": "vector", "clip": 0.05, "only": "body.*", "weight_decay": 0.1, "momentum": 0.1},
]


@pytest.mark.parametrize("network", [Hand, norm, tied], ids=["plain", "norm", "tied"])
@pytest.mark.parametrize("how", SGD, ids=lambda how: ",".join(f"{k}={v}" for k, v in how.items()) or "plain")
def test_descend_is_torchs_sgd(network, how):
    at = site(network)
    start = at.initial
    how = {"batch": 8} | how
    drift = Vector(torch.linspace(-1, 1, len(start)), start.layout)
    corrections = {"vector": drift, "parameters": drift.params, "function": lambda w: 0.5 * (w - start) + drift}
    how["correct"] = corrections.get(how.get("correct"))

    me = client(at)
    w, steps = me.descend(start, lr=0.2, **how)

    net = held(at, start).train()
    moving = {n: p for n, p in net.named_parameters() if how.get("only") is None or n.startswith(how["only"][:-1])}
    sgd = torch.optim.SGD(
        moving.values(), lr=0.2, momentum=how.get("momentum", 0), weight_decay=how.get("weight_decay", 0)
    )
    batches = list(client(at).batches(how["batch"], how.get("epochs"), how.get("steps")))
    for batch in batches:
        sgd.zero_grad()
        at.task.loss(net, batch).backward()
        for p in moving.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if how.get("clip"):
            nn.utils.clip_grad_norm_(moving.values(), how["clip"])
        if how["correct"] is not None:
            here = Vector(flattened(net, start.layout), start.layout)
            more = how["correct"](here) if callable(how["correct"]) else how["correct"]
            for name, p in moving.items():
                p.grad += more[name]
        sgd.step()
    assert steps == len(batches) == me.steps and me.samples == sum(map(len, batches))
    assert w.layout == start.layout and not w.readonly
    torch.testing.assert_close(w.flat, flattened(net, start.layout), rtol=1e-4, atol=2e-6)
    untouched = [n for n in start.params if n not in moving]
    assert all(torch.equal(w[name], start[name]) for name in untouched)


@pytest.mark.parametrize("lr", [0.25, 0.1])
@pytest.mark.parametrize("network", [Hand, norm], ids=["plain", "norm"])
def test_a_loop_over_grad_is_descend_bitwise(network, lr):
    at = site(network)
    descended, _ = client(at).descend(at.initial, lr=lr, epochs=2, batch=8)
    me = client(at)
    w = me.initial.clone()
    for batch in me.batches(8, epochs=2):
        w = w - lr * me.grad(w, batch)
    if lr == 0.25:
        assert torch.equal(w.flat, descended.flat)
    else:  # `descend` rounds once where the loop rounds lr * g and then the difference
        torch.testing.assert_close(w.flat, descended.flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{"steps": 0}, {"epochs": 0}])
def test_no_steps_leave_the_vector_as_it_is(how):
    me = client(site(norm))
    w, steps = me.descend(me.initial, lr=0.1, batch=8, **how)
    assert steps == me.steps == 0 and torch.equal(w.flat, me.initial.flat) and not me.logs


def test_descend_leaves_its_start_and_its_result_alone():
    me = client(site(norm))
    start = me.initial.clone()
    before = start.flat.clone()
    first, _ = me.descend(start, lr=0.1, batch=8)
    kept = first.flat.clone()
    me.descend(first, lr=0.1, batch=8)
    me.judge(start, me.data)
    assert torch.equal(start.flat, before) and torch.equal(first.flat, kept)


# buffers


def trained(policy):
    """A client's first and second training under a policy: (start, first, second, state)."""
    at = site(norm, buffers=policy)
    me = client(at)
    first, _ = me.descend(at.initial, lr=0.1, batch=8)
    again = client(at, state=dict(me.state), nth=1)
    second, _ = again.descend(first, lr=0.1, batch=8)
    return at, first, second, again


def statistics_after(at, w, me):
    net = held(at, w).train()
    for batch in me.batches(8):
        net(batch.x)
    return flattened(net, w.layout)[w.layout.split :]


def test_averaged_statistics_travel_with_the_vector():
    at, first, second, me = trained("average")
    assert not torch.equal(first.buffers.flat, at.initial.buffers.flat)
    assert not torch.equal(second.buffers.flat, first.buffers.flat)
    assert STATISTICS not in me.state and not me.state.changed


def test_local_statistics_stay_with_the_client():
    at, first, second, me = trained("local")
    for w in (first, second):
        assert torch.equal(w.buffers.flat, at.initial.buffers.flat), "what is sent does not move"
    averaged = trained("average")
    assert torch.equal(first.params.flat, averaged[1].params.flat), "training mode ignores the statistics"
    assert torch.equal(me.state[STATISTICS], averaged[2].buffers.flat), "they go on from where they were"
    assert me.state.changed
    own = second.clone()
    own.flat[own.layout.split :] = me.state[STATISTICS]
    measured = me.evaluate(second)
    plain = F.cross_entropy(held(at, own).eval()(me.task.data(0, "test").x), me.task.data(0, "test").y).item()
    assert measured["loss"] == pytest.approx(plain), "a client is judged with its own statistics"


def test_ignored_statistics_never_move():
    at, first, second, me = trained("ignore")
    for w in (first, second):
        assert torch.equal(w.buffers.flat, at.initial.buffers.flat)
    assert torch.equal(second.params.flat, trained("average")[2].params.flat) and not me.state
    w = at.initial.clone()
    me.grad(w, me.data.all())
    assert torch.equal(w.buffers.flat, at.initial.buffers.flat)


def test_local_statistics_are_in_every_network_of_the_client():
    at, _, w, me = trained("local")
    own = w.clone()
    own.flat[own.layout.split :] = me.state[STATISTICS]
    x = me.data.x
    net = held(at, own).eval()
    with torch.no_grad():
        expected, features = net(x), net.body(x)
        close(me.net(w)(x), expected)
        close(me.scores(w, x), expected)
        close(me.features(w, x), features)
        assert not torch.allclose(held(at, w).eval()(x), expected, atol=1e-2)


@pytest.mark.parametrize("policy", ["average", "local", "ignore"])
def test_a_further_look_moves_no_statistics(policy):
    me, other = (client(site(norm, buffers=policy)) for _ in range(2))
    w, batch = me.initial.clone(), me.data.all()
    first = me.grad(w, batch)
    moved, remembered = w.buffers.flat.clone(), me.state.get(STATISTICS)
    assert torch.equal(moved, me.initial.buffers.flat) == (policy != "average")
    assert (remembered is not None) == (policy == "local")
    again = me.grad(w, batch, statistics=False)
    assert torch.equal(again.flat, first.flat), "the pass is in training mode all the same"
    assert torch.equal(w.buffers.flat, moved)
    if policy == "local":
        assert torch.equal(me.state[STATISTICS], remembered)
    other.grad(w, batch, statistics=False)
    assert STATISTICS not in other.state and not other.state.changed


# batches


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 25), st.integers(0, 30), st.integers(1, 4))
def test_an_epoch_has_every_sample_once(count, size, epochs):
    at = Site(Problem(Hand, sizes=(count,)), seed=0)
    numbers = torch.arange(count)
    data = Data(numbers[:, None].float(), numbers)
    batches = [batch.y for batch in client(at).batches(size, epochs=epochs, data=data)]
    a_batch = size or count
    an_epoch = -(-count // a_batch)
    assert len(batches) == epochs * an_epoch
    for start in range(0, len(batches), an_epoch):
        epoch = batches[start : start + an_epoch]
        assert [len(y) for y in epoch[:-1]] == [a_batch] * (an_epoch - 1)
        assert torch.cat(epoch).sort().values.equal(numbers)
    if a_batch >= count:
        assert all(y.equal(numbers) for y in batches), "all at once come in their own order"
    taken = [batch.y for batch in client(at).batches(size, steps=2 * an_epoch + 1, data=data)]
    assert len(taken) == 2 * an_epoch + 1
    assert all(a.equal(b) for a, b in zip(taken, batches, strict=False)), "steps run on into the next epochs"


def test_the_order_comes_from_the_nodes_own_stream():
    def order(me):
        return torch.cat([batch.x for batch in me.batches(8)])

    at = site()
    me = client(at)
    first, second = order(me), order(me)
    torch.rand(100)
    again = client(at)
    assert torch.equal(first, order(again)) and torch.equal(second, order(again))
    assert not torch.equal(first, second), "every pass is shuffled anew"
    others = [
        client(at, nth=1),
        Client(at, 0, {}, "train", 2),
        Client(at, 0, {}, "evaluate", 1),
        client(Site(at.task, 1)),
    ]
    assert not any(torch.equal(first, order(other)) for other in others)
    one, two = list(client(at).batches(8, epochs=2))[:4], list(client(at).batches(8, epochs=2))[4:]
    assert not all(torch.equal(a.x, b.x) for a, b in zip(one, two, strict=True)), "and every epoch"


def test_batches_that_cannot_be():
    me = client(site())
    with pytest.raises(UsageError, match="epochs or steps, not both"):
        next(me.batches(8, epochs=1, steps=1))
    with pytest.raises(UsageError, match="a node without data"):
        next(me.batches(8, data=Data(torch.empty(0, 6), torch.empty(0, dtype=torch.int64))))
    with pytest.raises(UsageError, match="no public data at the server"):
        next(Server(Site(Private((5, 5)), 0), 2).batches())


class Private(Toy):
    def public(self):
        return None


def test_a_large_client_is_gathered_in_pieces_without_losing_a_sample(monkeypatch):
    monkeypatch.setattr("fedloom.task.CHUNK_BYTES", 6 * 4 * 10)
    data = client(site()).data
    order = torch.randperm(len(data), generator=client(site()).rng("order"))
    pieces = list(data.pieces(4, order))
    assert [len(piece) for piece in pieces] == [4] * 7 + [2]
    assert torch.equal(torch.cat([p.x for p in pieces]), data.x[order])
    assert torch.equal(torch.cat([p.y for p in pieces]), data.y[order])


# the rest of a node


def test_net_is_a_network_of_its_own():
    me = client(site(norm))
    w = me.initial + 0.5
    net = me.net(w)
    out = net(me.data.x)
    assert not net.training and not out.requires_grad
    close(out, held(me.site, w).eval()(me.data.x))
    me.descend(w, lr=0.1, batch=8)
    assert torch.equal(net(me.data.x), out), "training on the bench leaves it alone"
    for value in net.state_dict().values():
        value.zero_()
    assert torch.equal(w.flat, (me.initial + 0.5).flat) and torch.equal(me.net(w)(me.data.x), out)


def test_features_are_the_bodys():
    me = client(site(norm))
    w = me.initial + 0.1
    features = me.features(w, me.data.x)
    assert features.shape == (30, 8) and not features.requires_grad
    close(features, held(me.site, w).eval().body(me.data.x))


def test_names_of_kinds_of_modules():
    me = client(site(norm))
    norms = ("body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var")
    assert me.names_of(nn.BatchNorm1d) == norms
    assert me.names_of(nn.Linear) == ("body.0.weight", "body.0.bias", "head.weight", "head.bias")
    assert me.names_of(nn.Conv2d) == () and me.names_of(nn.Module) == me.layout.names


def test_evaluation():
    me = client(site(norm))
    w = me.initial
    test = me.task.data(0, "test")
    out = held(me.site, w).eval()(test.x)
    expected = {
        "n": 12,
        "loss": F.cross_entropy(out, test.y).item(),
        "accuracy": (out.argmax(1) == test.y).float().mean().item(),
    }
    assert me.evaluate(w) == pytest.approx(expected)
    assert me.evaluate(lambda x: held(me.site, w).eval()(x)) == pytest.approx(expected)
    assert me.evaluate(w, "validation")["n"] == 6 and me.evaluate(w, "train")["n"] == 30
    assert me.steps == 0 and torch.equal(me.site.initial.flat, w.flat)


def test_evaluation_without_data_is_no_measure(monkeypatch):
    me = client(site())
    empty = Data(me.data.inputs, me.data.labels, torch.empty(0, dtype=torch.int64))
    monkeypatch.setattr(me.task, "data", lambda id, split: empty)
    assert me.evaluate(me.initial) == {"n": 0} and me.n == 0


def test_dropout_on_the_bench_is_seeded_by_the_call():
    from fedloom.calls import Call
    from fedloom.engines.perform import perform
    from fedloom.methods.optimize.fedavg import FedAvg

    at = site(dropping)

    def reply(nth=0, round=1):
        call = Call("call", "local", (0,), {}, {}, "train", round, nth)
        torch.rand(3)
        return perform(FedAvg(), at, {}, call, 0, {"model": at.initial}).reply["delta"].flat

    assert torch.equal(reply(), reply())
    assert not torch.equal(reply(), reply(nth=1)) and not torch.equal(reply(), reply(round=2))


def test_initial_weights_come_from_the_seed_alone():
    torch.rand(7)
    one, again, other = (Site(Problem(Hand), seed=s).initial for s in (0, 0, 1))
    assert torch.equal(one.flat, again.flat) and not torch.equal(one.flat, other.flat) and one.readonly


def test_logs_are_kept_apart_from_the_algorithm():
    me = client(site())
    me.log(a=1.0, b=torch.tensor(2.0, requires_grad=True))
    me.log(a=3.0)
    assert me.logs["a"] == [1.0, 3.0] and not me.logs["b"][0].requires_grad


def test_streams_for_a_purpose_are_fresh_each_time_and_the_same_again():
    def draws(me):
        return [torch.rand(2, generator=me.rng(p)).tolist() for p in ("a", "a", "b")]

    one = draws(client(site()))
    assert one == draws(client(site())) and len({tuple(d) for d in one}) == 3


STRANGE = Layout(("w",), ((3,),), 1)
STRANGER = Vector(torch.ones(3), STRANGE)
WIDER = Layout(("body.weight", "body.bias", "head.weight", "unused"), ((1, 6), (1,), (3, 1), (2,)), 4)
WRONG = [
    (lambda me: me.grad(STRANGER, me.data.all()), "no network here has the layout"),
    (lambda me: me.descend(STRANGER, lr=0.1), "no network here has the layout"),
    (lambda me: me.net(STRANGER), "no network here has the layout"),
    (lambda me: me.features(STRANGER, me.data.x), "no network here has the layout"),
    (lambda me: me.evaluate(STRANGER), "no network here has the layout"),
    (lambda me: me.descend(me.initial, lr=0.1, correct=STRANGER), "a correction needs the layout"),
    (lambda me: me.descend(me.initial, lr=0.1, correct=lambda w: STRANGER), "a correction needs the layout"),
    (lambda me: me.descend(me.initial, lr=0.1, correct=Vector(torch.ones(12), WIDER)), "a correction needs the layout"),
    (lambda me: me.descend(me.initial, lr=0.1, only="tail.*"), "unknown part of a model 'tail.*'"),
    (lambda me: me.descend(me.initial, lr=0.1, epochs=1, steps=1), "epochs or steps, not both"),
]


@pytest.mark.parametrize(("action", "complaint"), WRONG)
def test_what_does_not_fit_is_refused(action, complaint):
    with pytest.raises(UsageError) as refused:
        action(client(site()))
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_state_takes_message_values_and_tells_whether_it_changed():
    me = client(site(), state={"a": 1})
    assert me.state["a"] == 1 and len(me.state) == 1 and not me.state.changed
    with pytest.raises(CodecError, match=r"client\.state"):
        me.state["net"] = nn.Linear(1, 1)
    me.state["b"] = [torch.ones(2)]
    del me.state["a"]
    assert list(me.state) == ["b"] and me.state.changed


def test_server_values():
    server = Server(site(), population=7)
    server.control = server.model.zeros_like()
    server.table = {"x": [1, 2]}
    assert server.values.keys() == {"model", "control", "table"} and server.population == 7
    with pytest.raises(UsageError, match="unknown server value 'contrl'; did you mean 'control'"):
        server.contrl  # noqa: B018
    with pytest.raises(CodecError, match="server"):
        server.critic = nn.Linear(1, 1)
    with pytest.raises(UsageError, match=r"server\.layout is the node's own"):
        server.layout = 3
    assert server.model.readonly, "also before it comes out of a checkpoint"
    assert server.evaluate(server.model)["n"] == 24


def test_server_values_are_declared_in_setup():
    server = Server(site(), population=7)
    server.begin("setup", 0)
    server.control, server.best = server.model.zeros_like(), None
    for kind, round in (("train", 1), ("finish", 1), ("train", 2)):
        server.begin(kind, round)
        server.model, server.best = server.model + server.control, round
        with pytest.raises(
            UsageError, match=r"unknown server value 'modle'; did you mean 'model'\? \(known: best, "
        ) as no:
            server.modle = server.model
        assert "declared in setup(self, server, clients): server.modle = ..., or None" in str(no.value)
        with pytest.raises(UsageError, match=r"server\.layout is the node's own"):
            server.layout = 3
    assert server.values.keys() == {"model", "control", "best"} and server.best == 2
    server.population, server.round = 8, 3
    assert server.values.keys() == {"model", "control", "best"}, "what is the node's own is no server value"


def bent(activation):
    return nn.Sequential(nn.Linear(6, 3), activation())


def loss_of(net, batch):
    return F.cross_entropy(net(batch.x), batch.y)


def test_another_network_runs_beside_the_tasks_and_is_the_same_at_every_node():
    task = Toy((20, 20))
    one, other = Client(Site(task, 3), 0, {}), Client(Site(task, 3), 1, {})
    narrow, broad = one.network(nn.Linear, 6, 3), one.network(nn.Linear, 6, 4)
    assert torch.equal(narrow.flat, other.network(nn.Linear, 6, 3).flat)
    assert one.network(nn.Linear, 6, 3) is narrow and len(broad) == 28 and len(narrow) == 21
    before = one.initial.flat.clone()
    w, steps = one.descend(narrow, lr=0.5, epochs=20, batch=5)
    assert steps == 80 and w.layout == narrow.layout and torch.equal(one.site.bench.flat, before)
    assert one.evaluate(w, "train")["accuracy"] > 0.9 > 0.6 > other.evaluate(other.initial, "train")["accuracy"]
    # By hand, from the same start: one step of the whole batch.
    by_hand = nn.Linear(6, 3)
    by_hand.load_state_dict({name: narrow[name] for name in narrow})
    loss_of(by_hand, one.data.all()).backward()
    step = one.descend(narrow, lr=0.1, steps=1, loss=loss_of)[0]
    torch.testing.assert_close(step["weight"], narrow["weight"] - 0.1 * by_hand.weight.grad)
    with pytest.raises(UsageError, match=r"no network here has the layout .* made known by `client.network"):
        Client(Site(task, 3), 1, {}).net(narrow)


def test_two_networks_of_one_layout_are_refused_unless_they_are_the_same():
    client = Client(Site(Toy((20,)), 0), 0, {})
    client.network(bent, nn.ReLU)
    with pytest.raises(UsageError, match="but not the same modules"):
        client.network(bent, nn.Tanh)


def test_scores_are_differentiable_in_the_vector():
    client = Client(Site(Toy((20,)), 0), 0, {})
    flat = client.initial.flat.clone().requires_grad_()
    batch = client.data.all()
    value = F.cross_entropy(client.scores(Vector(flat, client.layout), batch.x), batch.y)
    (slope,) = torch.autograd.grad(value, flat)
    torch.testing.assert_close(slope, client.grad(client.initial, batch).flat)


class Frozen(Toy):
    """A network of which only the head is learned."""

    def network(self):
        net = super().network()
        net.body.requires_grad_(False)
        return net


def test_what_is_frozen_is_no_part_of_the_vector():
    client = Client(Site(Frozen((20,)), 0), 0, {})
    assert set(client.layout.names) == {"head.weight", "head.bias"}
    body = [p.clone() for p in client.site.bench.net.body.parameters()]
    w, _ = client.descend(client.initial, lr=0.5, epochs=5, batch=5)
    assert not torch.equal(w.flat, client.initial.flat)
    assert all(torch.equal(a, b) for a, b in zip(body, client.site.bench.net.body.parameters(), strict=True))
    net = client.net(w)
    assert torch.equal(Vector.of(net, w.layout).flat, w.flat)
    assert net.body[0].weight is client.site.bench.net.body[0].weight and net.head.weight is not w["head.weight"]
    torch.testing.assert_close(client.scores(w, client.data.x), net(client.data.x))
