"""One step of descent, by its formula."""

import pytest
import torch

from fedloom.descent import Descent
from fedloom.optimizers import SGD


@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (0.5, 0.25)])
def test_three_steps_by_hand(terms, momentum, weight_decay):
    rule = SGD(momentum)
    job = Descent(None, 0.1, None, None, None, None, None, rule, weight_decay, None, None, None)
    draw = torch.Generator().manual_seed(0)
    at = [torch.randn(3, generator=draw, dtype=torch.float64), torch.randn(2, 2, generator=draw, dtype=torch.float64)]
    expected, ball, velocity = [w.clone() for w in at], [0.0, 0.0], rule.start(at)
    for _ in range(3):
        gradient, *more = ([torch.randn(w.shape, generator=draw, dtype=torch.float64) for w in at] for _ in range(3))
        rule.step(at, job.direction(at, gradient, more[:terms]), job.rate(0, 3), velocity, None)
        for i in range(2):
            d = gradient[i] + sum(term[i] for term in more[:terms]) + weight_decay * expected[i]
            ball[i] = momentum * ball[i] + d
            expected[i] = expected[i] - 0.1 * ball[i]
    for mine, by_hand in zip(at, expected, strict=True):
        torch.testing.assert_close(mine, by_hand)
