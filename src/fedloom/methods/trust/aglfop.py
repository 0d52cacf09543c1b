"""AGLFOP, and the decomposition of disparity."""

from dataclasses import dataclass

import torch

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.trust._disparity import decomposed, least_error, parity_gap
from fedloom.plugin import Plugin


@dataclass(frozen=True)
class AGLFOP(Plugin):
    """Where does unfairness come from, and how accurate is the best predictor under bounds on global and local one?

    Hamman and Dutta: Demystifying Local and Global Fairness Trade-offs in Federated Learning Using Partial Information
    Decomposition, ICLR 2024, arXiv 2307.11333 (official code FaisalHamman/FairFL-PID).

        any method, around which nothing changes; at every evaluation, Z the sensitive attribute, S the client:
        client s:  n_s[z, y, yh]: how many of its test samples are of group z and class y, and predicted as yh
        server:    P(s, z, y, yh) <- n_s / total;   global I(Z; Yh);   local I(Z; Yh | S);   in bits
                   unique   = min over Q with P's (z, yh) and (z, s) of I_Q(Z; Yh | S)
                   redundant = global - unique;   masked = local - unique
                   limit(e) = 1 - min of Q(yh != y) over Q(yh | s, z, y) with I_Q(Z; Yh) <= e and I_Q(Z; Yh | S) <= e

    Departures:
    1. The official code minimises with SLSQP from a random start, for two clients and two groups, and takes what it
       stops at. Here the decomposition is by iterated projections, and the limit by linear programs, for any number of
       clients, groups and classes; what is told is feasible, and optimal to 1e-5.
    2. The program has q(s, z, yh) as its variables: both bounds depend on it alone, and the least error for a q is the
       mass that has to move.
    3. No refinement by the hull of a trained model's ROC points: the limit is of predictors that may know s, z and y.

    Identities: what is trained is bitwise what the inner method trains; redundant - masked = I(Z; S) - I(Z; S | Yh).
    """

    inner: Method = FedAvg()  # the method that trains, and whose predictions are audited
    sensitive: str = "sex"  # Z: the column of metadata that must not tell, numbered from 0
    bounds: tuple[float, ...] = (0.0, 0.1)  # e, in bits: bounds on both disparities whose best accuracies are told
    # also the limit at the model's own disparities, and how far below it the model is; half a second an evaluation
    headroom: bool = False

    by_class = True
    light = {"bounds": (0.0,)}

    def setup(self, server, clients):
        column = server.task.global_test().metadata.get(self.sensitive)
        if column is None or column.is_floating_point() or column.dim() != 1:
            what = "there is none" if column is None else "it holds fractions"
            raise UsageError(
                f"aglfop.sensitive={self.sensitive} is a column beside x and y with the number of each sample's group, "
                f"and {what}; set metadata={self.sensitive}, or name another column (sensitive=NAME)"
            )
        if not self.bounds or min(self.bounds) < 0:
            raise UsageError(f"aglfop.bounds are {self.bounds}; give at least one bound in bits, none below 0")
        self.inner.setup(server, clients)

    def observe(self, server, clients):
        judged = self.inner.observe(server, clients)
        tables = [up.table for up in clients.call(self.count, **self.inner.predict_message(server, clients))]
        counts = stacked([table for table in tables if table.numel()])
        if counts is None:
            return judged
        p = counts / counts.sum()
        audit = decomposed(p.sum(2)) | {"parity_gap": parity_gap(p.sum((0, 2)))}
        audit["worst_parity_gap"] = max(parity_gap(part.sum(1)) for part in p)
        truth = p.sum(3)
        audit |= {f"limit_{bound:g}": 1 - least_error(truth, bound, bound) for bound in self.bounds}
        if self.headroom:
            limit = 1 - least_error(truth, audit["global_disparity"], audit["local_disparity"])
            audit |= {"limit": limit, "headroom": limit - float(p.diagonal(axis1=2, axis2=3).sum())}
        server.log(**audit)
        return judged

    @client
    def count(self, client, **message):
        """n_s [Z, C, C], int32; empty where there is nothing to test on."""
        data = client.task.data(client.id, "test")
        if not len(data) or client.site.blind:
            return {"table": torch.zeros(0, dtype=torch.int32)}
        judged = self.inner.predict(client, **message)
        if isinstance(judged, dict):  # several by name, of which the first is the main one
            judged = next(iter(judged.values()))
        with torch.no_grad():
            outputs = judged(data.x) if callable(judged) else client.scores(judged, data.x)
        groups, classes = data[self.sensitive].long(), client.task.classes
        cells = (groups * classes + data.y) * classes + outputs.argmax(1)
        size = (int(groups.max()) + 1) * classes**2
        return {"table": torch.bincount(cells, minlength=size).view(-1, classes, classes).int()}


def stacked(tables):
    """Tables [Z_s, C, C] as float64 [S, Z, C, C], with nobody in groups that a client has not seen; None for none."""
    if not tables:
        return None
    most = max(len(table) for table in tables)
    padded = [torch.nn.functional.pad(table, (0, 0, 0, 0, 0, most - len(table))) for table in tables]
    return torch.stack(padded).double().cpu().numpy()
