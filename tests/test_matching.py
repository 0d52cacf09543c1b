"""Matching neurons."""

import itertools
import math

import pytest
import torch

from fedloom.methods.aggregate._matching import Neurons, match
from fedloom.random import stream


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=stream(seed, "test"), dtype=torch.float64)


def test_permuted_networks_are_matched_neuron_by_neuron():
    rows, order = 3 * drawn(6, 5), torch.randperm(6, generator=stream(1, "test"))
    merged, (one, other) = match([rows, rows[order]], stream(0, "m"), gamma=2.0)
    assert len(merged) == 6 and torch.equal(one[order], other)
    torch.testing.assert_close(merged[one], rows * 2 / 3)  # J s / (J s + s0)


def test_widths_stay_between_the_widest_and_the_sum():
    rows = [drawn(n, 4, seed=n) for n in (3, 7, 5)]
    for gamma in (1e-6, 1.0, 1e12):
        merged, found = match(rows, stream(0, "m"), gamma=gamma)
        assert 7 <= len(merged) <= 15
        assert all(len(where.unique()) == len(where) for where in found), "a client's neurons stay apart"
        assert torch.equal(torch.cat(found).unique(), torch.arange(len(merged))), "no neuron is left empty"
    equal = [drawn(4, 3, seed=n) for n in range(3)]
    assert len(match(equal, stream(0, "m"), gamma=1e-9)[0]) == 4
    assert len(match([10 * one for one in equal], stream(0, "m"), gamma=1e12)[0]) == 12


@pytest.mark.parametrize(("sigma", "sigma0", "mu"), [(1.0, 1.0, 0.0), (0.5, 2.0, 0.4), (2.0, 0.5, -0.7)])
@pytest.mark.parametrize("gamma", [0.1, 2.0, 50.0])
def test_an_assignment_is_the_best_of_all(gamma, sigma, sigma0, mu):
    s, s0, mean = 1 / sigma**2, 1 / sigma0**2, torch.full((3,), mu, dtype=torch.float64)
    neurons = Neurons(3, sigma, sigma0, mean)
    neurons.add(2 * drawn(2, 3, seed=5), torch.arange(2))
    neurons.add(2 * drawn(1, 3, seed=7), torch.tensor([1]))  # the second is more popular
    rows, clients = 2 * drawn(3, 3, seed=6), 4
    total, members = neurons.total.clone(), neurons.members.clone()

    def worth(where):
        sum_of, fresh = 0.0, 0
        for row, place in zip(rows, where, strict=True):
            if place < 2:
                s_i = s0 + s * members[place]
                gain = (s * row + total[place]).square().sum() / (s + s_i) - total[place].square().sum() / s_i
                sum_of += float(gain) + math.log(members[place] / (clients - members[place]))
            else:
                fresh += 1
                alone = (s * row + s0 * mean).square().sum() / (s + s0) - (s0 * mean).square().sum() / s0
                sum_of += float(alone) - 2 * math.log(place - 1) + 2 * math.log(gamma / clients)
        return sum_of

    best = max(itertools.permutations(range(5), 3), key=worth)
    found = neurons.assign(rows, clients, gamma).tolist()
    kept = [place if place < 2 else None for place in best]
    assert [place if place < 2 else None for place in found] == kept
    new = [place for place in found if place >= 2]
    assert sorted(new) == list(range(2, 2 + len(new)))


def test_the_widest_client_comes_first_and_each_pass_has_a_random_order_of_its_own():
    rows = [drawn(n, 4, seed=n) for n in (3, 7, 5)]
    _, found = match(rows, stream(0, "m"), gamma=1e-6, passes=0)
    assert found[1].tolist() == list(range(7)) and max(int(where.max()) for where in found) == 6
    for passes in (0, 1, 4):
        used, drawn_from = stream(0, "m"), stream(0, "m")
        match(rows, used, passes=passes)
        for _ in range(passes):
            torch.randperm(3, generator=drawn_from)
        assert torch.equal(used.get_state(), drawn_from.get_state())


@pytest.mark.parametrize("mu", [0.0, 1.5])
def test_a_neuron_is_the_posterior_mean_of_its_rows(mu):
    rows, mean = 3 * drawn(5, 4), torch.full((4,), mu)
    order = torch.randperm(5, generator=stream(1, "test"))
    merged, (one, *_) = match([rows, rows[order], rows], stream(0, "m"), sigma=0.5, sigma0=2.0, mean=mean)
    # Of normal rows with precision 4 around a neuron with precision 1/4 around the mean.
    torch.testing.assert_close(merged[one], (3 * 4 * rows + mean / 4) / (3 * 4 + 1 / 4))


def test_beyond_ten_clients_a_neuron_becomes_no_more_popular():
    neurons = Neurons(1, 1.0, 1.0, torch.zeros(1, dtype=torch.float64))
    row = torch.ones(1, 1, dtype=torch.float64)
    for place, count in ((0, 11), (1, 17)):
        for _ in range(count):
            neurons.add(row, torch.tensor([place]))
    # At 10 each of 20 clients log(10 / 10) is 0; what is left speaks for the one whose mean of rows is a hair larger.
    fit = [(1 + n) ** 2 / (2 + n) - n**2 / (1 + n) for n in (11, 17)]
    assert fit[0] < fit[1] and neurons.assign(row, 20, 1e-9).tolist() == [1]
    far = -row * 0.3
    fit = [(n - 0.3) ** 2 / (2 + n) - n**2 / (1 + n) for n in (11, 17)]
    assert fit[0] > fit[1] and neurons.assign(far, 20, 1e-9).tolist() == [0], "although the other has more clients"


def test_taking_out_undoes_adding():
    neurons = Neurons(3, 0.5, 2.0, torch.ones(3, dtype=torch.float64))
    neurons.add(drawn(3, 3), torch.arange(3))
    before = neurons.total.clone()
    neurons.add(drawn(2, 3, seed=1), torch.tensor([1, 3]))
    assert neurons.remove(drawn(2, 3, seed=1), torch.tensor([1, 3])).tolist() == [0, 1, 2, -1]
    torch.testing.assert_close(neurons.total, before)
