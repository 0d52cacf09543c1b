"""InCo Aggregation."""

from dataclasses import dataclass

import torch

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.heterogeneous import _depths
from fedloom.nets.depth import depth, shallower, stages
from fedloom.ranges import LearningRate, Positive

TINY = 1e-7  # keeps norms of zero from dividing


@dataclass(frozen=True)
class InCo(Method):
    """Where few clients have the deep blocks of a network, can the update of a shallow block repair theirs?

    Chan, Zhou, Zhao, Jiang, Ngai: Internal Cross-layer Gradients for Extending Homogeneity to Heterogeneity in
    Federated Learning, ICLR 2024, arXiv 2308.11464 (official code ChanYunHin/InCo-Aggregation).

        server:    send client k the first d_k blocks of each stage, and all that is in no stage
        client k:  E local epochs on this network;  send its update
        server:    g <- for each tensor the mean of the updates over those that have it
                   for each matrix A of g in a later block, B that of its shape in the shallowest block of the stage:
                     theta <- min(|<A, B>| / <B, B>, 5)
                     A <- clip((A / |A| + theta B / |B|) (|A| + |B|) / 2, 0.1)
                   w <- w + g

    Departures:
    1. Clients have 1, 2, ... blocks in every stage, as in ResNet-10, 18 and 26 of the paper; its ResNet-14 and 22 have
       a block more in the two last stages only. Its vision transformers, with norms in place of matrices, are left out.
    2. SGD in place of Adam, which the setting `optimizer` gives.
    3. <A, B> and norms are those of every 3x3 slice of a convolution, as in the official code; of a Linear, which it
       does not mix, those of the whole matrix.
    4. B is the last matrix of that shape in its block, as in the official code; all A and B are as the mean left them.

    Identities: without `cross`, clients of equal depths are FedAvg with equal weights; the matrices of first blocks,
    the head and all vectors are bitwise the same with and without `cross`, as are the bytes; A = B comes to 2 A, B = 0
    to A / 2, which is the published rule.
    """

    lr: LearningRate = 0.05  # local learning rate; the paper takes 0.001 with Adam
    epochs: Positive[int] = 1  # E: local epochs; 5 in the paper
    batch: int = 10  # batch size, 0 for all samples; 64 in the paper
    depths: tuple[int, ...] = ()  # d_k: blocks a stage, dealt to the clients in turn; none: 1, 2, ... up to all
    cross: bool = True  # whether updates of shallow blocks are mixed in; False averages what there is
    bound: float = 5.0  # the most that theta can be, as in the official code
    clip: Positive[float] = 0.1  # the most that a mixed entry can move, as in the official code

    needs = ("blocks",)
    compressible = ("delta",)
    refuses = {"aggregate": "clients have networks of different depths, so that their replies are not alike"}

    def networks(self, site):
        whole = depth(site.bench.net)
        if whole < 2:
            raise UsageError("inco needs a network with a stage of several blocks; take resnet:3 or mlp:64,64,64")
        return {
            name(level): site.derive(shallower, level) for level in _depths.levels(self, self.depths, whole, "depths")
        }

    def setup(self, server, clients):
        server.references = references(server.net(server.model)) if self.cross else {}
        if self.cross and not server.references:
            raise UsageError(
                "inco mixes the updates of matrices of one shape in two blocks of a stage, and this network has none; "
                "take a deeper one, such as resnet:2 or mlp:64,64,64"
            )

    def round(self, server, cohort):
        up = cohort.mean(self.local, model=_depths.parts(server, cohort, self.network_of))
        g = {name: piece[name] for piece in up.delta.values() for name in piece}
        if self.cross:
            pairs = {name: other for name, other in server.references.items() if name in g}
            g |= {name: crossed(g[name], g[other], self.bound, self.clip) for name, other in pairs.items()}
        model = server.model.clone()
        for name, update in g.items():
            model[name].add_(update)
        server.model = model

    def network_of(self, node, k):
        """The name of client k's network."""
        return _depths.network_of(node, k, self.depths, name)

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"delta": _depths.pieces(client, self.network_of(client, client.id), w - model)}

    def observe(self, server, clients):
        return _depths.judged(server)

    @client
    def predict(self, client, model):
        return model

    def predict_message(self, server, clients):
        return {"model": _depths.parts(server, clients, self.network_of)}


def name(level):
    """What the network of so many blocks a stage is called."""
    return f"depth{level}"


def references(net):
    """By the name of each matrix in a later block: the matrix whose update is mixed into its own."""
    found, held = {}, dict(net.named_parameters())
    for stage in stages(net):
        shallow = {}
        for block in stage:
            prefixes = tuple(f"body.{child}." for child in block)
            own = {held[one].shape: one for one in held if one.startswith(prefixes) and held[one].dim() > 1}
            found |= {
                one: shallow[held[one].shape] for one in held if one.startswith(prefixes) and held[one].shape in shallow
            }
            shallow = own | shallow
    return found


def crossed(a, b, bound, clip):
    """An update with that of a shallow block mixed in, slice by slice if they are convolutions."""
    dims = (-2, -1) if a.dim() == 4 else tuple(range(a.dim()))
    long, wide = (torch.linalg.vector_norm(v, dim=dims, keepdim=True) for v in (a, b))
    theta = ((a * b).sum(dims, keepdim=True).abs() / ((b * b).sum(dims, keepdim=True) + TINY)).clamp(max=bound)
    return ((a / (long + TINY) + theta * b / (wide + TINY)) * (long + wide) / 2).clamp(-clip, clip)
