"""Secure aggregation: the sum is exactly the plain fixed-point sum, whoever is lost; the server sees only masks."""

import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ran as experiment

from fedloom import encoding, run
from fedloom.boundary.secure import PHASES, Abandoned, Secure, aggregate, fresh, keyed, shamir
from fedloom.boundary.secure.field import FixedPoint
from fedloom.boundary.secure.outline import Outline
from fedloom.errors import RunError, UsageError
from fedloom.mean import Sum
from fedloom.message import Sparse
from fedloom.method import build
from fedloom.random import numpy_stream, stream
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector
from fedloom.world import World

pytest.importorskip("cryptography", reason="the extra fedloom[secure] is not installed")

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedloom.boundary.secure import keys
from fedloom.boundary.secure.client import SecureClient
from fedloom.boundary.secure.server import SecureServer

LAYOUT = Layout(("w", "b", "m"), ((2, 3), (3,), (3,)), 2)
CLIENTS = (2, 3, 5, 7, 11, 13, 17, 19, 23)
QUICK = settings(deadline=None, max_examples=60)


def reply(client, sparse=True):
    """A reply with every kind of field that a mean takes; whole ones and partial ones."""
    draw = stream(7, "reply", client)
    fields = {
        "delta": Vector(torch.randn(LAYOUT.size, generator=draw), LAYOUT),
        "control": torch.randn(2, 2, generator=draw, dtype=torch.float64),
        "seen": torch.randint(0, 50, (3,), generator=draw),
        "loss": float(torch.rand((), generator=draw)),
        "steps": client,
        "nested": {"pair": (torch.randn(2, generator=draw), -1.5), 3: [True, 0.25]},
    }
    if sparse:
        rows = torch.randperm(6, generator=draw)[: 1 + client % 5].sort().values
        fields["protos"] = {label: torch.randn(2, generator=draw) for label in {client % 2, 2}}
        fields["part"] = Sparse(rows, torch.randn(len(rows), 2, generator=draw), 6)
    return fields


CONTRIBUTIONS = {client: (reply(client), float(3 + client % 4)) for client in CLIENTS}


def plain(contributions, present, terms):
    """The fixed-point sum without any mask, one whole number after the other: {(path, place): (numbers, weights)}."""
    totals = {}
    for client in present:
        fields, weight = contributions[client]
        for key, x in flat(fields):
            number, w = totals.get(key, (0, 0))
            exact = Fraction(weight * x) * Fraction(terms.fixed.scale)  # the product is a double, as in every mean
            assert abs(exact) < 2**63
            totals[key] = (number + round(exact), w + round(Fraction(weight) * Fraction(terms.fixed.weight_scale)))
    return totals


def flat(value, path=()):
    """(path with coordinate, number) of everything a reply or a mean holds."""
    if isinstance(value, Vector):
        value = value.flat
    if isinstance(value, Sparse):
        value = {int(row): values for row, values in zip(value.index, value.values, strict=True)}
    if isinstance(value, torch.Tensor):
        yield from (((*path, place), number) for place, number in enumerate(value.double().flatten().tolist()))
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, (*path, key))
    else:
        yield path, float(value)


def withheld(contributions, asked, lost, quorum):
    """Keys of `protos` that so few clients have that their sum could be one client's own."""
    there = [client for client in asked if client in contributions and client not in lost.get("advertise", ())]
    counts = Counter(label for client in there for label in contributions[client][0].get("protos", {}))
    return {label for label, count in counts.items() if count < max(quorum, len(there) - quorum + 2)}


def check(contributions, asked, lost, secure, present, weight, **how):
    """The secure sum of those `present` is the plain one to the last step, and its mean within the stated error."""
    total = aggregate(contributions, asked, lost, secure, weight=weight, **how)
    terms = secure.terms(bytes(16), len(asked), weight)
    secret = withheld(contributions, asked, lost, terms.quorum)
    expected = {
        key: value
        for key, value in plain(contributions, present, terms).items()
        if key[0] != "protos" or key[1] not in secret
    }
    mean = total.mean()
    assert total.count == len(present)
    assert total.weight == sum(contributions[client][1] for client in present)
    found = dict(flat(mean))
    assert found.keys() == expected.keys()
    for key, (number, weights) in expected.items():
        exact = (number / terms.fixed.scale) / (weights / terms.fixed.weight_scale)
        assert found[key] in (exact, float(np.float32(exact)))
    return total


# Fixed point


@QUICK
@given(
    bits=st.integers(24, 64),
    clients=st.integers(2, 300),
    clip=st.floats(0.01, 100),
    weight=st.floats(0.5, 50),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_the_largest_sum_does_not_wrap_and_a_scale_twice_as_large_would(bits, clients, clip, weight, sign):
    try:
        fixed = FixedPoint(bits, clients, clip, weight)
    except UsageError:
        assert clients * weight * 2**7 > 2 ** (bits - 3)  # there really were too few bits
        return
    most = sign * weight * clip
    lanes = fixed.encoded(np.array([most]), fixed.scale)
    total = fixed.reduced(sum((lanes.copy() for _ in range(clients)), np.zeros(1, fixed.dtype)))
    assert int(fixed.whole(total)[0]) == clients * round(Fraction(most) * Fraction(fixed.scale))
    assert clients * (Fraction(weight * clip) * 2 * Fraction(fixed.scale) + Fraction(1, 2)) > 2 ** (bits - 1) - 1
    assert clients * (Fraction(weight) * 2 * Fraction(fixed.weight_scale) + Fraction(1, 2)) > 2 ** (bits - 1) - 1


@QUICK
@given(
    weights=st.lists(st.floats(0.0, 4.0), min_size=2, max_size=12),
    bits=st.sampled_from([24, 32, 48, 64]),
    data=st.data(),
)
def test_the_mean_is_within_the_stated_error(weights, bits, data):
    xs = [data.draw(st.floats(-2.0, 2.0)) for _ in weights]
    fixed = FixedPoint(bits, len(weights), 2.0, 4.0)
    number = fixed.decoded(
        sum(fixed.encoded(np.array([w * x]), fixed.scale) for w, x in zip(weights, xs, strict=True)), fixed.scale
    )
    weight = fixed.decoded(sum(fixed.encoded(np.array([w]), fixed.weight_scale) for w in weights), fixed.weight_scale)
    exact_weight = sum(map(Fraction, weights))
    if weight[0] <= 0 or exact_weight == 0:
        return
    exact = sum((Fraction(w) * Fraction(x) for w, x in zip(weights, xs, strict=True)), Fraction(0)) / exact_weight
    rounding = 2.0 * len(weights) * 2.0**-50 * 4.0 / weight[0]  # of doubles, on top
    assert abs(Fraction(number[0] / weight[0]) - exact) <= fixed.error(weight[0], len(weights)) + rounding


@pytest.mark.parametrize("bits", [16, 24, 32, 40, 56, 64])
def test_lanes_survive_their_bytes(bits):
    fixed = FixedPoint(bits, 2, 1.0, 1.0)
    lanes = numpy_stream(0, "lanes").integers(0, 2**bits, 101, np.uint64, endpoint=False).astype(fixed.dtype)
    assert len(fixed.to_bytes(lanes)) == 101 * bits // 8
    assert (fixed.from_bytes(fixed.to_bytes(lanes)) == lanes).all()


@QUICK
@given(
    xs=st.lists(st.floats(-2.0, 2.0), min_size=2, max_size=8),
    bits=st.sampled_from([24, 32, 40, 48, 64]),
    data=st.data(),
)
def test_lanes_are_the_whole_numbers_mod_their_bits_and_so_are_their_sums(xs, bits, data):
    """By Python's own whole numbers; the masks that are added on the way fill the lanes' whole width."""
    fixed = FixedPoint(bits, len(xs), 2.0, 1.0)
    exact = [round(Fraction(x) * Fraction(fixed.scale)) for x in xs]
    lanes = [fixed.encoded(np.array([x]), fixed.scale) for x in xs]
    assert [int(lane[0]) for lane in lanes] == [whole % 2**bits for whole in exact]
    mask = data.draw(st.integers(0, 2 ** (8 * fixed.dtype.itemsize) - 1))
    masked = sum(lanes, np.array([mask], fixed.dtype))
    assert int(fixed.reduced(masked)[0]) == (sum(exact) + mask) % 2**bits


def test_too_few_bits_are_refused_with_what_to_do():
    with pytest.raises(
        UsageError, match=r"24 bits are too few .* 1000 clients .* weights up to 1000: give it more bits"
    ):
        FixedPoint(24, 1000, 1.0, 1000.0)


# Shamir's shares


@QUICK
@given(secret=st.binary(min_size=32, max_size=32), n=st.integers(1, 9), data=st.data())
def test_any_t_shares_give_the_secret_and_one_fewer_does_not(secret, n, data):
    t = data.draw(st.integers(1, n))
    holders = data.draw(st.lists(st.integers(0, 10**6), min_size=n, max_size=n, unique=True))
    shares = shamir.split(secret, holders, t, numpy_stream(1, "shares").bytes)
    some = data.draw(st.permutations(holders))[:t]
    assert shamir.Interpolation(some).secret(shares) == secret
    if t > 1:
        assert shamir.Interpolation(some[:-1]).secret(shares) != secret


def test_fewer_than_t_shares_fit_every_secret():
    """Whatever t - 1 holders have, for any other secret there is a polynomial that gives them just that."""
    secret, other = bytes(31) + b"\1", bytes(31) + b"\2"
    shares = shamir.split(secret, [0, 1, 2, 3], 3, numpy_stream(2, "shares").bytes)
    point = shamir.Interpolation([0, 1, 2]).at_zero
    known = sum(point[k] * int.from_bytes(shares[k], "big") for k in (0, 1))
    third = (int.from_bytes(other, "big") - known) * pow(point[2], -1, shamir.PRIME) % shamir.PRIME
    forged = {**shares, 2: third.to_bytes(33, "big")}
    assert shamir.Interpolation([0, 1, 2]).secret(forged) == other


def test_the_coefficients_of_a_polynomial_are_drawn_one_by_one():
    """Of secret 0 the shares at 1 and 2 are c1 + c2 and 2 c1 + 4 c2: a third of the second is the first if c1 = c2."""
    shares = shamir.split(bytes(32), [0, 1, 2], 3, numpy_stream(4, "shares").bytes)
    one, two = (int.from_bytes(shares[holder], "big") for holder in (0, 1))
    assert two != 3 * one % shamir.PRIME


def test_shares_whose_value_is_no_key_are_refused():
    assert shamir.Interpolation([0]).secret({0: (2**256 - 1).to_bytes(33, "big")}) == b"\xff" * 32
    for value in (2**256, shamir.PRIME - 1):
        with pytest.raises(RunError, match="do not fit together"):
            shamir.Interpolation([0]).secret({0: value.to_bytes(33, "big")})


def test_the_field_is_a_field():
    assert all(pow(a, shamir.PRIME - 1, shamir.PRIME) == 1 for a in range(2, 60))
    assert shamir.PRIME > 2**256


# Masks


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("size", [1, 7, 32_768, 70_001])
def test_a_mask_is_the_key_stream_and_comes_off_again(dtype, size):
    lanes = numpy_stream(3, "lanes").integers(0, 2**32, size, np.uint64).astype(dtype)
    before = lanes.copy()
    keys.mask(lanes, b"k" * 32, 1)
    octets = Cipher(AES(b"k" * 32), CTR(bytes(16))).encryptor().update(bytes(size * lanes.itemsize))
    # Every block of the stream is used once, also where it is drawn in chunks.
    assert ((lanes - before) == np.frombuffer(octets, dtype)).all()
    keys.mask(lanes, b"k" * 32, -1)
    assert (lanes == before).all()


def test_no_two_purposes_and_no_two_sessions_have_a_key_in_common():
    secrets, sessions, purposes = (b"a" * 32, b"b" * 32), (b"1" * 16, b"2" * 16), ("mask", "letter")
    each = [keys.derived(a, b, c) for a in secrets for b in sessions for c in purposes]
    assert len(set(each)) == 8
    mine, theirs = b"m" * 32, b"t" * 32
    both = keys.agreed(mine, keys.public(theirs), b"1", "mask"), keys.agreed(theirs, keys.public(mine), b"1", "mask")
    assert both[0] == both[1] != keys.agreed(mine, keys.public(theirs), b"2", "mask")
    assert both[0] != keys.agreed(mine, keys.public(theirs), b"1", "letter")


def test_a_changed_letter_or_another_key_is_noticed():
    sealed = keys.sealed(b"k" * 32, b"letter", b"from 1 to 2")
    assert keys.opened(b"k" * 32, sealed, b"from 1 to 2") == b"letter"
    for key, letter, about in (
        (b"l" * 32, sealed, b"from 1 to 2"),
        (b"k" * 32, sealed[:-1] + b"\0", b"from 1 to 2"),
        (b"k" * 32, sealed, b"from 2 to 1"),
    ):
        with pytest.raises(RunError, match="changed on its way"):
            keys.opened(key, letter, about)


# The whole protocol


@pytest.mark.parametrize(("bits", "signed"), [(32, False), (48, False), (64, False), (48, True)])
@pytest.mark.parametrize("phase", PHASES)
def test_the_sum_is_exact_with_the_stated_share_lost_in_any_one_phase(phase, bits, signed):
    secure = Secure(bits=bits, clip=64.0, signed=signed)
    gone = CLIENTS[1::3][: 2 if signed else 3]
    assert len(gone) == len(CLIENTS) - secure.quorum(len(CLIENTS))
    present = CLIENTS if phase in ("check", "unmask") else [client for client in CLIENTS if client not in gone]
    check(CONTRIBUTIONS, CLIENTS, {phase: gone}, secure, present, 6.0, entropy=keyed(0, phase))


@QUICK
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_the_sum_is_exact_whoever_is_lost_whenever_up_to_the_stated_share(data, seed):
    share = data.draw(st.sampled_from([0.51, 0.6, 2 / 3, 0.9]))
    secure = Secure(threshold=share, clip=64.0, signed=data.draw(st.booleans()))
    spare = len(CLIENTS) - secure.quorum(len(CLIENTS))
    gone = data.draw(st.lists(st.sampled_from(CLIENTS), max_size=spare, unique=True))
    when = {client: data.draw(st.sampled_from(PHASES)) for client in gone}
    lost = {phase: {client for client in gone if when[client] == phase} for phase in PHASES}
    present = [client for client in CLIENTS if when.get(client, "unmask") in ("check", "unmask")]
    have = {client: part for client, part in CONTRIBUTIONS.items() if client in present or when[client] != "advertise"}
    check(have, CLIENTS, lost, secure, present, 6.0, entropy=keyed(seed))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_whoever_falls_silent_says_nothing_later_and_all_others_say_everything(phase, signed):
    transcript, secure = [], Secure(clip=64.0, signed=signed)
    aggregate(CONTRIBUTIONS, CLIENTS, {phase: [5]}, secure, weight=6.0, transcript=transcript)
    every = [name for name in PHASES if signed or name != "check"]
    for client in CLIENTS:
        said = [passed.phase for passed in transcript if passed[1:3] == ("up", client)]
        assert said == [name for name in every if client != 5 or PHASES.index(name) < PHASES.index(phase)]


@pytest.mark.parametrize("protocol", ["bonawitz", "ckks"])
@pytest.mark.parametrize("lost", [{}, {"unmask": [13]}])
def test_a_client_that_takes_part_and_has_nothing_to_give_is_named(protocol, lost):
    """Also where it falls silent after all replies are there: a sum without it would pass for the whole one."""
    if protocol == "ckks":
        pytest.importorskip("tenseal", reason="the extra fedloom[he] is not installed")
    contributions = {client: part for client, part in CONTRIBUTIONS.items() if client != 13}
    with pytest.raises(RunError, match="client 13 takes part in a secure sum, and has nothing to give"):
        aggregate(contributions, CLIENTS, lost, Secure(protocol, clip=64.0), weight=6.0)


@pytest.mark.parametrize("phase", PHASES)
def test_one_loss_too_many_gives_the_round_up(phase):
    secure = Secure(clip=64.0, signed=phase == "check")
    gone = CLIENTS[: len(CLIENTS) - secure.quorum(len(CLIENTS)) + 1]
    transcript = []
    left, needed = (6, 7) if phase == "check" else (5, 6)
    why = f"given up at '{phase}': {left} of 9 clients were left, {needed} are needed; nothing was revealed"
    with pytest.raises(Abandoned, match=why):
        aggregate(CONTRIBUTIONS, CLIENTS, {phase: gone}, secure, weight=6.0, transcript=transcript)
    # Nobody is told what would let anything be opened: no client speaks after the phase in which it was given up.
    assert {passed.phase for passed in transcript if passed.direction == "up"} <= {*PHASES[: PHASES.index(phase) + 1]}


def test_the_sum_does_not_depend_on_the_entropy_nor_on_real_randomness():
    totals = [
        aggregate(CONTRIBUTIONS, CLIENTS, {"masked": {5}}, Secure(clip=64.0), weight=6.0, entropy=entropy)
        for entropy in (keyed(0, "a"), keyed(1, "a"), fresh)
    ]
    first = totals[0].packed()
    assert all(encoding.same(total.packed(), first) for total in totals[1:])


def test_replies_of_one_form_cost_less_than_different_ones_and_bytes_are_those_sent():
    alike = {client: (reply(client, sparse=False), 1.0) for client in CLIENTS}
    transcripts = {}
    for name, contributions in (("alike", alike), ("different", CONTRIBUTIONS)):
        transcripts[name] = transcript = []
        aggregate(contributions, CLIENTS, {}, Secure(clip=64.0, weight=6.0), transcript=transcript)
        assert len(transcript) == len(CLIENTS) * (4 + 3)
        outline = Outline()
        for fields, weight in contributions.values():
            outline = outline.joined(Outline.of(Sum.of(fields, weight)))
        masked = {passed.bytes for passed in transcript if (passed.phase, passed.direction) == ("masked", "up")}
        # Only client 2 has the key 0 of `protos`: its two numbers and their weight are not among them.
        blob = 6 * (outline.weights + outline.numbers - (3 if name == "different" else 0))
        assert masked == {len(encoding.encode({"masked": bytes(blob)}))}
    told = {
        name: next(passed.bytes for passed in transcript if passed[:2] == ("advertise", "down"))
        for name, transcript in transcripts.items()
    }
    assert told["alike"] < told["different"]


@pytest.mark.parametrize("signed", [False, True])
def test_nobody_is_told_what_all_have(signed):
    """What the server says about who is there does not grow with the reply."""
    told = set()
    for fields in ({"w": 1.0}, reply(2)):
        transcript, secure = [], Secure(clip=64.0, signed=signed)
        aggregate(dict.fromkeys(CLIENTS, (fields, 1.0)), CLIENTS, {}, secure, transcript=transcript)
        told |= {passed.bytes for passed in transcript if passed[:2] == ("advertise", "down")}
    assert len(told) == 1


def terms_and_parties(clients=(0, 1, 2, 3, 4), entropy=None):
    secure = Secure(clip=4.0, bits=32)
    terms = secure.terms(b"s" * 16, len(clients), 1.0)
    entropy = entropy or keyed(5)
    return terms, SecureServer(terms, clients), {c: SecureClient(terms, c, entropy(c)) for c in clients}


def test_the_server_sees_only_what_is_uniform():
    """All that clients send, with other replies and the same keys: only what is masked differs, and no bit leans."""
    size, clients = 4000, (0, 1, 2, 3, 4)
    sent = {}
    for name, value in (("zeros", 0.0), ("ones", 1.0)):
        terms, server, parties = terms_and_parties()
        sums = {c: Sum.of({"w": torch.full((size,), value)}, 1.0) for c in clients}
        said = {}
        for c in clients:
            said["advertise", c] = parties[c].advertise(sums[c])
            server.advertised(c, said["advertise", c])
        for c in clients:
            said["share", c] = parties[c].share(server.roster())
            server.shared(c, said["share", c])
        for c in clients:
            said["masked", c] = parties[c].masked(server.mail_for(c), sums[c])
            server.took(c, said["masked", c])
        for c in clients[:4]:
            said["unmask", c] = parties[c].unmask(server.arrived())
            server.unmasked(c, said["unmask", c])
        assert (server.lanes()[2:] == round(5 * value * terms.fixed.scale)).all()
        sent[name] = said
    for (phase, c), data in sent["zeros"].items():
        if phase != "masked":
            assert data == sent["ones"][phase, c]
            continue
        masks = [np.frombuffer(encoding.decode(sent[name][phase, c])["masked"], "<u4") for name in ("zeros", "ones")]
        # The one-time pad of the same keys: what the reply adds, and nothing else.
        assert ((masks[1] - masks[0])[2:] == np.uint32(terms.fixed.scale)).all()
        ones = np.unpackbits(masks[0].view(np.uint8))
        assert abs(ones.mean() - 0.5) < 5 * 0.5 / math.sqrt(len(ones))


def test_without_enough_shares_the_masks_stay():
    """What the server could compute itself before shares come: no pair of masked replies cancels, nor do all."""
    clients = (0, 1, 2, 3, 4)
    terms, server, parties = terms_and_parties()
    sums = {c: Sum.of({"w": torch.zeros(50)}, 1.0) for c in clients}
    for c in clients:
        server.advertised(c, parties[c].advertise(sums[c]))
    for c in clients:
        server.shared(c, parties[c].share(server.roster()))
    for c in clients:
        server.took(c, parties[c].masked(server.mail_for(c), sums[c]))
    assert (server.sum[2:] != 0).mean() > 0.9  # its own masks are still on the sum
    for c in clients[: terms.quorum - 1]:
        server.unmasked(c, parties[c].unmask(server.arrived()))
    with pytest.raises(Abandoned, match="'unmask': 3 of 5 clients were left, 4 are needed"):
        server.total()
    server.unmasked(4, parties[4].unmask(server.arrived()))
    assert (server.total().mean()["w"] == 0).all()


def test_a_late_reply_of_a_client_given_up_stays_under_its_own_mask():
    """Why there are two masks: the server takes client 4 for lost, gets its pair masks, and then its reply comes."""
    clients = (0, 1, 2, 3, 4)
    terms, server, parties = terms_and_parties()
    sums = {c: Sum.of({"w": torch.full((50,), float(c))}, 1.0) for c in clients}
    for c in clients:
        server.advertised(c, parties[c].advertise(sums[c]))
    for c in clients:
        server.shared(c, parties[c].share(server.roster()))
    for c in clients[:4]:
        server.took(c, parties[c].masked(server.mail_for(c), sums[c]))
    late = parties[4].masked(server.mail_for(4), sums[4])
    for c in clients[:4]:
        server.unmasked(c, parties[c].unmask(server.arrived()))
    assert (server.total().mean()["w"] == 1.5).all()
    with pytest.raises(RunError, match="its own reply did not arrive"):
        parties[4].unmask(server.arrived())
    # All that the server can now take off: the pair masks, by client 4's own key.
    lanes = terms.fixed.from_bytes(encoding.decode(late)["masked"])
    for peer in clients[:4]:
        keys.mask(lanes, keys.agreed(parties[4].mask_key, server.masks[peer], terms.session, "pair mask"), 1)
    naked = terms.lanes(server.outline, sums[4], 4)
    assert (lanes != naked).mean() > 0.9
    keys.mask(lanes, keys.derived(parties[4].own_seed, terms.session, "own mask"), -1)
    assert (lanes == naked).all()


def test_a_client_refuses_what_would_lay_a_reply_open():
    clients = (0, 1, 2, 3, 4)
    terms, server, parties = terms_and_parties()
    sums = {c: Sum.of({"w": torch.ones(3)}, 1.0) for c in clients}
    with pytest.raises(RunError, match="out of turn"):
        parties[0].share(b"")
    for c in clients:
        server.advertised(c, parties[c].advertise(sums[c]))
    roster = encoding.decode(server.roster())

    def changed(**fields):
        return encoding.encode({**roster, **fields})

    def newcomer():
        client = SecureClient(terms, 0, keyed(5)(0))
        client.advertise(sums[0])
        return client

    letters, masks = roster["letters"], roster["masks"]
    assert len(encoding.decode(newcomer().share(changed()))["sealed"]) == 4
    with pytest.raises(RunError, match="changed keys, or gave one twice"):
        newcomer().share(changed(letters={**letters, 0: letters[1]}))
    # Its own key swapped for one that the server made: the server reads the others' letters to it, or knows its masks.
    servers = keys.public(b"m" * 32)
    for swapped in ({"letters": {**letters, 0: servers}}, {"masks": {**masks, 0: servers}}):
        with pytest.raises(RunError, match="changed keys, or gave one twice"):
            newcomer().share(changed(**swapped))
    with pytest.raises(RunError, match="changed keys, or gave one twice"):
        newcomer().share(changed(masks={**masks, 2: masks[1]}))
    few = {c: key for c, key in letters.items() if c < 3}, {c: key for c, key in masks.items() if c < 3}
    with pytest.raises(RunError, match="3 clients are in it, 4 are needed"):
        newcomer().share(changed(letters=few[0], masks=few[1]))
    many = (
        {c: keys.public(bytes([c + 1] * 32)) for c in range(9)},
        {c: keys.public(bytes([c + 99] * 32)) for c in range(9)},
    )
    with pytest.raises(RunError, match="of 9 clients 4 would do"):
        newcomer().share(changed(letters={**many[0], **letters}, masks={**many[1], **masks}))

    for c in clients:
        server.shared(c, parties[c].share(server.roster()))
    mail = encoding.decode(server.mail_for(0))["sealed"]
    with pytest.raises(RunError, match="changed on its way"):
        parties[0].masked(encoding.encode({"sealed": {**mail, 1: mail[2]}}), sums[0])
    for stranger in (7, 0):  # nobody on its roster, and itself: a pair mask with neither would ever come off
        parties[0].said = 2
        with pytest.raises(RunError, match=f"a letter from {stranger}, who is not in it"):
            parties[0].masked(encoding.encode({"sealed": {**mail, stranger: mail[2]}}), sums[0])
    for c in clients[1:]:
        server.took(c, parties[c].masked(server.mail_for(c), sums[c]))
    for there, why in (
        ([1, 2, 3], "3 clients are in it, 4 are needed"),
        ([2, 3, 4, 5], "that are not in it"),
        ([0, 2, 3, 4], "its own reply did not arrive"),
        ([4, 3, 2, 1], "that are not in it"),
        ([1, 2, 3, 3], "that are not in it"),
    ):
        said, parties[1].said = parties[1].said, 3
        with pytest.raises(RunError, match=why):
            parties[1].unmask(encoding.encode({"arrived": there}))
        parties[1].said = said
    server.unmasked(1, parties[1].unmask(server.arrived()))
    with pytest.raises(RunError, match="out of turn"):  # a second question could ask for the other secret
        parties[1].unmask(encoding.encode({"arrived": [0, 1, 2, 3]}))


def test_the_server_turns_away_what_is_no_message_of_the_protocol():
    _, server, parties = terms_and_parties()
    with pytest.raises(RunError, match="client 0 sent no message"):
        server.advertised(0, b"nonsense")
    with pytest.raises(RunError, match="client 0 sent the fields"):
        server.advertised(0, encoding.encode({"letter": b""}))
    with pytest.raises(RunError, match="not what it should be"):
        server.advertised(0, encoding.encode({"letter": b"short", "mask": bytes(32), "outline": {}, "signature": b""}))
    with pytest.raises(RunError, match="an outline of a reply that is none"):
        server.advertised(
            0, encoding.encode({"letter": bytes(32), "mask": bytes(32), "outline": {"leaves": [1]}, "signature": b""})
        )
    with pytest.raises(RunError, match="client 9, who is out of the sum"):
        server.advertised(9, b"")
    one = Sum.of({"w": torch.ones(3)}, 1.0)
    for c, party in parties.items():
        server.advertised(c, party.advertise(one))
    with pytest.raises(RunError, match="client 0, who is out of the sum or has spoken"):
        server.advertised(0, b"")
    roster = server.roster()
    with pytest.raises(RunError, match="no letter for every other client"):
        server.shared(0, encoding.encode({"sealed": {1: b""}}))
    for c, party in parties.items():
        server.shared(c, party.share(roster))
    with pytest.raises(RunError, match="sent 4 masked bytes, expected 20"):
        server.took(0, encoding.encode({"masked": bytes(4)}))
    for c in (0, 1, 2, 3):
        server.took(c, parties[c].masked(server.mail_for(c), one))
    for c in (0, 1, 2, 3):
        data = encoding.decode(parties[c].unmask(server.arrived()))
        if c == 0:
            data["secrets"] = {4: bytes(33)}
        server.unmasked(c, encoding.encode(data))
    with pytest.raises(RunError, match=r"shares of client 4's mask key give another key|one of them is wrong"):
        server.total()


def test_the_server_takes_the_shares_that_it_asked_for_and_no_others():
    """One of every client that shared its secrets: fewer would take the sum apart after all, and of both secrets of a
    client, which lay its reply open, it must not come to have shares.
    """
    _, server, parties = terms_and_parties()
    one = Sum.of({"w": torch.ones(3)}, 1.0)
    for c, party in parties.items():
        server.advertised(c, party.advertise(one))
    for c, party in parties.items():
        server.shared(c, party.share(server.roster()))
    for c in (0, 1, 2, 3):
        server.took(c, parties[c].masked(server.mail_for(c), one))
    asked = encoding.decode(parties[0].unmask(server.arrived()))
    seeds, secrets = asked["seeds"], asked["secrets"]
    assert seeds.keys() == {0, 1, 2, 3} and secrets.keys() == {4}
    for sent in (
        {"seeds": {c: seeds[c] for c in (0, 1, 2)}, "secrets": secrets},
        {"seeds": seeds, "secrets": {}},
        {"seeds": seeds, "secrets": {**secrets, 1: secrets[4]}},
        {"seeds": {**seeds, 4: seeds[1]}, "secrets": secrets},
        {"seeds": {**seeds, 9: seeds[1]}, "secrets": secrets},
    ):
        with pytest.raises(RunError, match=r"client 0 sent shares of \d secrets, not those asked"):
            server.unmasked(0, encoding.encode(sent))
    server.unmasked(0, encoding.encode(asked))
    for c in (1, 2, 3):
        server.unmasked(c, parties[c].unmask(server.arrived()))
    assert (server.total().mean()["w"] == 1).all()


def signer(terms, clients=(0, 1, 2, 3, 4)):
    """Makes a client of a signed sum, the same one again and again."""
    private = {c: bytes([c + 1]) * 32 for c in clients}
    registry = {c: keys.Identity.public(key) for c, key in private.items()}
    return lambda c: SecureClient(terms, c, keyed(5)(c), keys.Identity(private[c], registry))


def test_a_signed_sum_holds_off_a_server_that_lies():
    """It invents clients, changes keys, and tells one client another list of those that arrived than the others."""
    clients = (0, 1, 2, 3, 4)
    terms = Secure(clip=4.0, signed=True).terms(b"s" * 16, 5)
    one, party = Sum.of({"w": torch.ones(3)}, 1.0), signer(terms)
    with pytest.raises(RunError, match="it has no identity"):
        SecureClient(terms, 0)
    server, parties = SecureServer(terms, clients), {c: party(c) for c in clients}
    for c in clients:
        server.advertised(c, parties[c].advertise(one))
    roster = encoding.decode(server.roster())

    def told(client, **changes):
        """What a client says to a roster in which the server has changed some entries."""
        again = party(client)
        again.advertise(one)
        return again.share(encoding.encode({name: {**part, **changes.get(name, {})} for name, part in roster.items()}))

    assert len(encoding.decode(told(0))["sealed"]) == 4
    with pytest.raises(RunError, match="client 1 did not sign what the server says it did"):
        told(0, masks={1: keys.public(b"m" * 32)})  # the server in the middle
    with pytest.raises(RunError, match="no signature of client 5"):
        told(0, letters={5: keys.public(b"l" * 32)}, masks={5: keys.public(b"m" * 32)})
    with pytest.raises(RunError, match="client 5 has no key in the registry"):
        told(0, letters={5: keys.public(b"l" * 32)}, masks={5: keys.public(b"m" * 32)}, signatures={5: bytes(64)})

    for c in clients:
        server.shared(c, parties[c].share(server.roster()))
    for c in clients:
        server.took(c, parties[c].masked(server.mail_for(c), one))
    with pytest.raises(RunError, match="out of turn"):
        parties[0].unmask(server.arrived())
    for c in clients[1:]:
        server.checked(c, parties[c].check(server.arrived()))
    # Client 0 hears that 4 was lost: its share of 4's mask key, with the others' shares of 4's seed, opened the reply.
    lie = parties[0].check(encoding.encode({"arrived": [0, 1, 2, 3]}))
    signatures = {0: encoding.decode(lie)["signature"], **server.checks}
    with pytest.raises(RunError, match="that are not in it"):
        parties[0].unmask(encoding.encode({"signatures": signatures}))
    parties[0].said -= 1
    with pytest.raises(RunError, match="client 1 did not sign"):
        parties[0].unmask(encoding.encode({"signatures": {c: signatures[c] for c in (0, 1, 2, 3)}}))
    parties[0].said -= 1
    with pytest.raises(RunError, match="1 clients are in it, 4 are needed"):
        parties[0].unmask(encoding.encode({"signatures": {0: signatures[0]}}))
    for c in clients[1:]:
        server.unmasked(c, parties[c].unmask(server.confirmed()))
    assert (server.total().mean()["w"] == 1).all()


def test_a_signed_sum_holds_off_a_server_that_lies_about_what_is_summed():
    """Of class 7, which client 0 alone has, the sum is its own number. And if others took something else for the sum
    than client 0, its numbers would stand where theirs do not.
    """
    clients = (0, 1, 2, 3, 4)
    terms = Secure(clip=8.0, signed=True).terms(b"s" * 16, 5)
    party = signer(terms)
    sums = {c: Sum.of({"w": 1.0, "protos": {0: 1.0} if c else {7: 5.0}}, 1.0) for c in clients}
    server, parties = SecureServer(terms, clients), {c: party(c) for c in clients}
    for c in clients:
        server.advertised(c, parties[c].advertise(sums[c]))
    roster = encoding.decode(server.roster())
    has, whole = roster["has"], Outline.of(Sum.of({"w": 1.0, "protos": {0: 1.0, 7: 1.0}}, 1.0))

    def told(**lies):
        """What client 0 takes to be summed."""
        again = party(0)
        again.advertise(sums[0])
        again.share(encoding.encode({**roster, **lies}))
        return set(again.outline.leaves)

    assert told() == told(outline=whole.packed()) == {("w",), ("protos", 0)}
    for lie, liar in (
        (dict.fromkeys(clients, has[0]), 1),  # all have class 7
        (dict.fromkeys(clients, has[1]), 0),
        ({c: has[c] for c in (1, 2, 3, 4)}, 0),
        ({}, 1),  # all have what client 0 has
    ):
        with pytest.raises(RunError, match=f"client {liar} did not sign"):
            told(has=lie)

    # Client 0 does not hear of client 4: three of four that have class 0 are too few, and to client 0 it is not summed.
    fewer = {name: {c: of[c] for c in (0, 1, 2, 3)} for name, of in roster.items() if name != "outline"}
    sealed = {}
    for c in (0, 1, 2, 3):
        sealed[c] = encoding.decode(parties[c].share(encoding.encode({**roster, **({} if c else fewer)})))["sealed"]
    signatures = {}
    for c in (0, 1, 2, 3):
        parties[c].masked(encoding.encode({"sealed": {peer: sealed[peer][c] for peer in sealed if peer != c}}), sums[c])
        checked = parties[c].check(encoding.encode({"arrived": [0, 1, 2, 3]}))
        signatures[c] = encoding.decode(checked)["signature"]
    assert set(parties[0].outline.leaves) < set(parties[1].outline.leaves)
    for c in (0, 1, 2, 3):
        with pytest.raises(RunError, match=f"client {0 if c else 1} did not sign"):
            parties[c].unmask(encoding.encode({"signatures": signatures}))


@pytest.mark.parametrize(
    ("fields", "weight", "why"),
    [
        ({"w": {"a": torch.tensor([0.0, -9.5])}}, 2.0, r"the field 'w.a' of client 1 holds -9.5, outside the range ±4"),
        ({"w": {"a": torch.tensor([0.0, math.nan])}}, 1.0, r"the field 'w.a' of client 1 holds nan"),
        ({"w": {"a": torch.tensor([0.0, math.inf])}}, 1.0, r"the field 'w.a' of client 1 holds inf"),
        ({"w": {"a": torch.zeros(2)}}, 2.5, "client 1 has the weight 2.5, a secure sum here takes weights up to 2"),
        ({"w": {"a": torch.zeros(3)}}, 1.0, r"the field 'w.a': replies differ, tensor \[[23]\] and tensor \[[23]\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_name_of_its_field(fields, weight, why):
    contributions = {0: ({"w": {"a": torch.ones(2)}}, 1.0), 1: (fields, weight)}
    with pytest.raises(RunError, match=why):
        aggregate(contributions, (0, 1), {}, Secure(clip=4.0), weight=2.0)


def test_outside_clip_moves_a_number_to_the_edge_of_the_range():
    contributions = {0: ({"w": torch.tensor([1.0, 2.0])}, 1.0), 1: ({"w": torch.tensor([-100.0, 2.0])}, 2.0)}
    mean = aggregate(contributions, (0, 1), {}, Secure(clip=4.0, outside="clip"), weight=2.0).mean()
    assert torch.allclose(mean["w"], torch.tensor([(1 - 2 * 4) / 3, 2.0]), atol=1e-6)
    with pytest.raises(RunError, match="holds nan"):
        aggregate({0: ({"w": math.nan}, 1.0), 1: ({"w": 0.0}, 1.0)}, (0, 1), {}, Secure(outside="clip"))


def test_the_sum_of_one_client_is_refused():
    with pytest.raises(RunError, match="needs two clients"):
        aggregate({0: ({"w": 1.0}, 1.0)}, (0,))


# The setting


def test_the_setting_is_read():
    assert Secure.parse("bonawitz") == Secure("bonawitz", 2 / 3, 48, 1024.0, None, "refuse", "refuse", False)
    assert Secure.parse("bonawitz:threshold=0.6,bits=32,clip=8,weight=1,outside=clip") == Secure(
        "bonawitz", 0.6, 32, 8.0, 1.0, "clip"
    )
    assert [Secure(threshold=0.6).quorum(n) for n in (2, 3, 5, 10, 11)] == [2, 2, 3, 6, 7]
    assert Secure().quorum(9) == 6
    assert [Secure(signed=True).quorum(n) for n in (2, 3, 6, 9, 10)] == [2, 3, 5, 7, 7]
    assert Secure.parse("bonawitz:signed=true,calls=allow") == Secure(signed=True, calls="allow")
    assert all(2 * Secure(threshold=0.500001).quorum(n) > n for n in range(2, 50))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("bonavitz", "did you mean 'bonawitz'"),
        ("bonawitz:treshold=0.6", "did you mean 'threshold'"),
        ("bonawitz:0.6", "write bonawitz:threshold=0.6"),
        ("bonawitz:threshold=0.5", "threshold=0.5; it lies over 0.5"),
        ("bonawitz:bits=33", "16, 24, 32, 40, 48, 56 or 64"),
        ("bonawitz:clip=-1", "clip=-1.0; it is a number over 0"),
        ("bonawitz:outside=cut", "outside"),
        ("ckks:bits=48", "16 to 36 bits"),
        ("ckks:signed=true", "only bonawitz is held against servers that lie"),
    ],
)
def test_a_wrong_setting_is_refused(text, why):
    with pytest.raises(UsageError, match=why):
        Secure.parse(text)


@pytest.mark.parametrize(
    "leaf",
    [
        [["w"], "tensor", [1 << 40], [], torch.empty(0)],
        [["w"], "tensor", [-1], [], torch.empty(0)],
        [["w"], "tensor", ["a"], [], torch.empty(0)],
        [["w"], "shape", [1], [], torch.empty(0)],
        [["w"], "vector", [4], [["w"], [[2, 2, 2]], 1], torch.empty(0)],
        [["w"], "vector", [4], [["w"]], torch.empty(0)],
        [["w"], "sparse", [], [], torch.empty(0)],
        [["w"], "tensor", [1], [], None],
        ["w"],
        None,
    ],
)
def test_a_strange_outline_is_refused_before_anything_is_made_of_it(leaf):
    with pytest.raises(RunError, match="an outline of a reply that is none"):
        Outline.unpacked({"leaves": [leaf], "containers": []})


def test_an_outline_survives_its_message():
    for client in CLIENTS:
        outline = Outline.of(Sum.of(*CONTRIBUTIONS[client]))
        assert Outline.unpacked(encoding.decode(encoding.encode({"outline": outline.packed()}))["outline"]) == outline


def test_an_absent_extra_is_named(monkeypatch):
    monkeypatch.setattr("fedloom.boundary.secure.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"bonawitz needs the extra: pip install 'fedloom\[secure\]'"):
        Secure.parse("bonawitz")


# In a run


def ran(**how):
    how = {"rounds": 3, **how}
    task = Toy((30, 20, 25, 35, 30, 20, 25, 35))
    return run("scaffold", task, eval_every=how["rounds"], report=False, **how)


def ledger(made):
    return [json.loads(line) for line in (made.path / "ledger.jsonl").read_text().splitlines()]


def test_a_secure_run_is_the_plain_run_but_for_rounding_and_pays_in_bytes():
    plain, secure = ran(), ran(secure="bonawitz:bits=64")
    one, other = plain.metrics[-1], secure.metrics[-1]
    assert other["global_test_accuracy"] == one["global_test_accuracy"]
    assert math.isclose(other["global_test_loss"], one["global_test_loss"], rel_tol=1e-6)
    assert other["up_bytes"] > one["up_bytes"]
    assert other["down_bytes"] > one["down_bytes"]
    assert 0 < other["secure_error"] < 1e-9
    fields = {(line["direction"], line["field"]) for line in ledger(secure) if line["kind"] == "train"}
    spoken = [f"secure.{phase}" for phase in PHASES if phase != "check"]
    assert {field for direction, field in fields if direction == "up"} == {*spoken}
    assert {field for direction, field in fields if direction == "down"} >= {*spoken[:3]}


def test_secure_runs_are_reproducible_on_any_engine():
    runs = [ran(secure="bonawitz"), ran(secure="bonawitz"), ran(secure="bonawitz", engine="loopback")]
    numbers = [
        [{name: row[name] for name in row if not name.endswith("seconds")} for row in made.metrics] for made in runs
    ]
    assert numbers[0] == numbers[1] == numbers[2]


def test_a_run_with_silent_clients_and_lost_replies_goes_on_and_says_when_a_round_was_given_up():
    made = ran(secure="bonawitz:threshold=0.6", dropout=0.2, lost=0.15, rounds=8)
    plain = ran(dropout=0.2, lost=0.15, rounds=8)
    given_up = [row["round"] for row in made.metrics if "given up" in row.get("note", "")]
    expected = [row["round"] for row in plain.metrics if row["replies"] < 5]
    assert given_up == expected
    assert 0 < len(expected) < 8
    # In the books: whoever is silent never begins, whoever is lost falls silent before it masks its reply.
    lines = [line for line in ledger(made) if line["direction"] == "up" and line["round"] == 1]
    spoke = {
        phase: {client for line in lines if line["field"] == f"secure.{phase}" for client in line["clients"]}
        for phase in PHASES
    }
    world = World(8, dropout=0.2, lost=0.15)
    awake = {client for client in range(8) if not world.silent(1, 0, client)}
    assert spoke["advertise"] == spoke["share"] == awake
    assert spoke["masked"] == {client for client in awake if not world.loses(1, 0, client)}
    assert len(spoke["masked"]) < len(awake) < 8


@pytest.mark.parametrize("protocol", [Secure(), Secure(threshold=0.51), Secure(signed=True), Secure("ckks")])
def test_what_fewer_than_the_quorum_have_stays_with_them(protocol):
    if protocol.protocol == "ckks":
        pytest.importorskip("tenseal", reason="the extra fedloom[he] is not installed")
    for having in range(1, 10):
        value = {client: torch.full((2,), 1.0 + client) for client in range(9)}
        parts = {
            client: ({"protos": {0: value[client]} | ({7: value[client]} if client < having else {})}, 1.0)
            for client in range(9)
        }
        mean = aggregate(parts, range(9), {}, protocol).mean()["protos"]
        assert (mean[0] == 5.0).all()
        quorum = protocol.quorum(9)
        if having < max(quorum, 9 - quorum + 2):
            assert 7 not in mean
        else:
            assert (mean[7] == sum(range(1, having + 1)) / having).all()
        # Whoever is lost later on, two at least are left in whatever comes out.
        for gone in (range(1, 10 - quorum), range(quorum, 9)):  # 0 holds the key of ckks
            left = aggregate(parts, range(9), {"masked": list(gone)}, protocol).mean()["protos"]
            assert 7 not in left or having - len(set(gone) & set(range(having))) >= 2


@pytest.mark.parametrize("lost", [(), (1,)])
def test_a_client_that_comes_without_an_outline_is_nobody_to_hide_behind(lost):
    """Two of three suffice; two have class 7, of whom one is lost, and the third never said what it has."""
    terms = Secure(clip=8.0).terms(b"s" * 16, 3)
    assert terms.quorum == 2
    sums = [Sum.of({"w": 1.0, "protos": protos}, 1.0) for protos in ({7: 5.0}, {7: 2.0}, {})]
    server, parties = SecureServer(terms, range(3)), [SecureClient(terms, c) for c in range(3)]
    for c, party in enumerate(parties):
        server.advertised(c, party.advertise(sums[c] if c < 2 else None))
    roster = server.roster()
    for c, party in enumerate(parties):
        server.shared(c, party.share(roster))
    there = [c for c in range(3) if c not in lost]
    for c in there:
        server.took(c, parties[c].masked(server.mail_for(c), sums[c]))
    if lost:
        with pytest.raises(Abandoned, match=r"'protos.7' may be that of one client alone; nothing was revealed"):
            server.arrived()
    else:
        for c in there:
            server.unmasked(c, parties[c].unmask(server.arrived()))
        assert server.total().mean() == {"w": 1.0, "protos": {7: 3.5}}


def test_prototypes_of_one_client_do_not_come_out_of_a_secure_mean():
    some, none = (
        experiment(build("fedproto"), Toy(), rounds=2, secure=f"bonawitz:threshold={share}") for share in (0.7, 1.0)
    )
    # Three of four clients have each class: as many as must stay, or one too few.
    assert set(some.server.protos) == {0, 1, 2} and "secure_withheld" not in some.record.metrics[0]
    assert none.server.protos == {} and none.record.metrics[0]["secure_withheld"] == 3


def test_a_method_that_asks_for_single_replies_is_refused_unless_they_are_no_secret():
    with pytest.raises(UsageError, match="rffl asks for none in its rounds"):
        run("rffl", Toy(), rounds=1, report=False, secure="bonawitz")
    with pytest.raises(UsageError, match="asks for each reply of judge by call"):
        run("oort", Toy(), rounds=1, report=False, secure="bonawitz")
    ledger = list(run("oort", Toy(), rounds=1, report=False, secure="bonawitz:calls=allow").ledger)
    assert {line["field"] for line in ledger if line["function"] == "judge"} & {"loss", "envelope"}
    assert "secure.masked" in {line["field"] for line in ledger}


def test_what_makes_no_sense_with_secure_aggregation_is_refused():
    with pytest.raises(UsageError, match="secure"):
        ran(secure="bonawitz", aggregate="median")
    with pytest.raises(UsageError, match="secure"):
        ran(secure="bonawitz", compress="topk:0.1")
