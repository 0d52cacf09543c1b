"""FedVARP."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fedloom.methods.participate.fedstale import FedStale
from fedloom.ranges import Linear


@dataclass(frozen=True)
class FedVARP(FedStale):
    """Can the last update of every client take away the noise of asking only a few?

    Jhunjhunwala, Sharma, Nagarkatti, Joshi: FedVARP: Tackling the Variance Due to Partial Client Participation in
    Federated Learning, UAI 2022, arXiv 2207.14130 (Algorithm 1).

        server:  w <- w + eta (mean_{k in S}(D_k - h_k) + sum_{all k} alpha_k h_k);   then h_k <- D_k for k in S

    Departures:
    1. It is FedStale with beta = 1 and p_k = |S| / N, which is the line above where all alpha_k are 1/N.
    2. Clients weigh by their samples; the paper's are of one size.

    Identities: everybody in every round: FedAvg; clients whose updates do not change: no noise from the choice.
    """

    beta: Annotated[float, Linear(0.0, 1.0)] = 1.0  # the paper's estimator; less is FedStale
    rates: Literal["estimated", "cohort"] = "cohort"  # p_k: as in the paper, the cohort is drawn uniformly
