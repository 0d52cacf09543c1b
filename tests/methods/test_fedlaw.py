"""FedLAW: the learned weights and their limits."""

import pytest
import torch
from problems import averaged_by_hand, close, network, node, ran
from torch.func import functional_call

from fedloom.errors import UsageError
from fedloom.methods.aggregate.fedlaw import FedLAW, scalars
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.task import Data
from fedloom.tasks.toy import Toy


class Biased(Toy):
    """The server has only data of the first client."""

    def public(self):
        return self.data(0, "train")


def test_without_server_epochs_it_is_fedavg_or_the_plain_mean():
    none = ran(FedLAW(server_epochs=1, server_lr=1e-12), Toy(), rounds=3).server.model.flat
    torch.testing.assert_close(none, ran(FedAvg(), Toy(), rounds=3).server.model.flat, rtol=1e-4, atol=1e-5)
    equal = Toy(sizes=(20, 20, 20))
    quad = ran(FedLAW(server_epochs=1, server_lr=1e-12, form="quad"), equal, rounds=3).server.model.flat
    torch.testing.assert_close(quad, ran(FedAvg(), equal, rounds=3).server.model.flat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["exp", "quad"])
def test_the_split_sums_to_one_and_everything_is_positive(form):
    made = ran(FedLAW(), Toy(), rounds=1)
    models = torch.stack(
        [node(made.site, k).descend(made.site.initial, lr=0.1, epochs=3, batch=5)[0].flat for k in range(4)]
    )
    share = torch.tensor([30.0, 20.0, 25.0, 35.0]) / 110
    method = FedLAW(form=form, server_epochs=30, server_lr=0.05)
    split, total, _ = method.learned(made.server, made.site.initial, models, share)
    assert float(split.sum()) == pytest.approx(1, abs=1e-6) and (split > 0).all() and total > 0
    assert not torch.allclose(split, share, atol=0.01) and float(total) != pytest.approx(1, abs=1e-3)


def learned_by_hand(net, models, share, data, form, epochs, lr, batch):
    """lambda and gamma after `epochs` of Adam on the loss of gamma sum_k lambda_k w_k; `net` keeps its statistics."""
    m = len(models)
    start = share.log() if form == "exp" else torch.full((m,), 1 / m**0.5)
    raw = torch.cat([start, torch.tensor([0.0 if form == "exp" else 1.0])]).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=lr, betas=(0.5, 0.999))
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]

    def both():
        if form == "exp":
            return raw[:m].exp() / raw[:m].exp().sum(), raw[m].exp()
        return raw[:m] ** 2 / (raw[:m] ** 2).sum(), raw[m] ** 2

    net.train()
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * 0.5 ** (epoch // 20)
        for piece in batch:
            lam, gamma = both()
            flat = gamma * sum(lam[k] * models[k] for k in range(m))
            parts = [
                part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
            ]
            out = functional_call(net, dict(zip(names, parts, strict=True)), (data.x[piece],))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(out, data.y[piece]).backward()
            optimizer.step()
    return [scalar.detach() for scalar in both()]


@pytest.mark.parametrize("form", ["exp", "quad"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_round_by_hand(form, norm):
    task, lr, epochs = Toy(norm=norm), 0.05, 22  # the rate halves after 20
    made = ran(FedLAW(form=form, server_lr=lr, server_epochs=epochs), task, rounds=1)
    site = made.site
    nets = [node(site, k).descend(site.initial, lr=0.05, epochs=1, batch=10)[0] for k in range(4)]
    share = torch.tensor(task.sizes) / sum(task.sizes)
    net = network(task, sum((p * w for p, w in zip(share[1:], nets[1:], strict=True)), share[0] * nets[0]))
    models = torch.stack([w.params.flat for w in nets])
    data = task.public()
    lam, gamma = learned_by_hand(net, models, share, data.all(), form, epochs, lr, [slice(None)])
    assert not torch.allclose(lam, share, atol=0.02) and abs(float(gamma) - 1) > 0.02, "both have been learned"
    expected = gamma * sum(lam[k] * models[k] for k in range(4))
    torch.testing.assert_close(made.server.model.params.flat, expected, rtol=0, atol=1e-4)
    for name, value in net.named_buffers():
        if value.is_floating_point():
            torch.testing.assert_close(made.server.model[name], value, rtol=1e-3, atol=1e-4)


def test_running_statistics_begin_as_the_clients_mean():
    task = Toy(norm=True)
    made = ran(FedLAW(server_epochs=0), task, rounds=2)
    assert close(made.server.model, averaged_by_hand(task, 2, lr=0.05, epochs=1, batch=10)[0], atol=1e-5)


def test_equal_models_move_the_total_only():
    made = ran(FedLAW(), Toy(), rounds=1)
    x = torch.zeros(3, requires_grad=True)
    g = torch.zeros(1, requires_grad=True)
    w = ran(FedAvg(), Toy(), rounds=3).server.model.flat
    split, total = scalars(x, g, "exp")
    scores = made.server.scores(
        type(made.server.model)(total * split @ w.expand(3, -1), made.server.layout), made.server.data.x
    )
    slopes = torch.autograd.grad(made.task.criterion(scores, made.server.data.all()), (x, g))
    assert slopes[0].abs().max() < 1e-6 < 1e-3 < slopes[1].abs().max()


def test_the_client_whose_data_the_server_has_gains_weight():
    made = ran(FedLAW(), Biased(sizes=(30, 30, 30)), rounds=1)
    models = torch.stack(
        [node(made.site, k).descend(made.site.initial, lr=0.1, epochs=8, batch=5)[0].flat for k in range(3)]
    )
    method = FedLAW(server_epochs=40, server_lr=0.05)
    split, _, _ = method.learned(made.server, made.site.initial, models, torch.full((3,), 1 / 3))
    assert split[0] > 0.4 > split[1:].max()


def test_it_learns_what_lowers_the_servers_loss():
    class Flipped(Toy):
        """One client whose labels are all wrong."""

        def data(self, client, split):
            data = super().data(client, split)
            return Data(data.inputs, (data.labels + 1) % 3, data.rows) if client == 1 and split == "train" else data

    task = Flipped(sizes=(30, 30, 30))
    law, plain = (ran(m, task, rounds=8).record.final["global_test_loss"] for m in (FedLAW(server_lr=0.05), FedAvg()))
    assert law < 0.8 * plain


def test_messages_are_fedavgs_and_public_data_are_needed():
    law, plain = ran(FedLAW(), Toy(), rounds=2), ran(FedAvg(), Toy(), rounds=2)
    for one, other in zip(law.record.metrics, plain.record.metrics, strict=True):
        assert abs(one["up_bytes"] - other["up_bytes"]) <= 4 * 8, "a field is called model, not delta"
    assert law.record.metrics[0]["gradient_steps"] == plain.record.metrics[0]["gradient_steps"] + 20

    class Private(Toy):
        def public(self):
            return None

    with pytest.raises(UsageError, match=r"fedlaw needs public data at the server: set public=0.05"):
        ran(FedLAW(), Private(), rounds=1)
    with pytest.raises(UsageError, match="fedlaw does not go with aggregate=median"):
        ran(FedLAW(), Toy(), rounds=1, aggregate="median")
