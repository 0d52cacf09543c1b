"""Sums under CKKS: exact in spite of its noise, by a server without the key."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fedloom import encoding, run
from fedloom.boundary.secure import PHASES, Abandoned, Secure, aggregate, keyed
from fedloom.errors import RunError, UsageError
from fedloom.mean import Sum
from fedloom.message import Sparse
from fedloom.random import stream
from fedloom.tasks.toy import Toy

pytest.importorskip("tenseal", reason="the extra fedloom[he] is not installed")

import tenseal

from fedloom.boundary.secure.cipher import SLOTS, WORKER
from fedloom.boundary.secure.he import HomomorphicClient, HomomorphicServer, KeyHolder

CLIENTS = (1, 4, 5, 8, 9)


def contributions(size=30):
    parts = {}
    for client in CLIENTS:
        draw = stream(3, "reply", client)
        rows = torch.randperm(4, generator=draw)[: 1 + client % 3].sort().values
        fields = {
            "w": torch.randn(size, generator=draw),
            "part": Sparse(rows, torch.randn(len(rows), generator=draw), 4),
        }
        parts[client] = (fields | ({"odd": 1.5} if client % 2 else {}), float(client))
    return parts


@pytest.mark.parametrize("lost", [{}, {"advertise": [1]}, {"masked": [4]}, {"share": [9], "unmask": [8]}])
def test_the_sum_is_that_of_masks_whole_number_by_whole_number(lost):
    clear = {"weight": 9.0, "entropy": keyed(0)}
    secret = aggregate(contributions(), CLIENTS, lost, Secure("ckks", 0.6, 32, 8.0), **clear)
    masked = aggregate(contributions(), CLIENTS, lost, Secure("bonawitz", 0.6, 32, 8.0), **clear)
    assert encoding.same(secret.packed(), masked.packed())


@pytest.mark.parametrize("bits", [16, 24, 32, 36])
def test_noise_stays_below_one_half_at_the_edges_of_the_range(bits):
    """The worst cases in several ciphertexts: all at one edge, all at the edges at random, and nothing at all."""
    size, clients = SLOTS + 100, range(12)
    secure = Secure("ckks", bits=bits, clip=1.0)
    signs = [2.0 * torch.randint(0, 2, (size,), generator=stream(5, "sign", c)) - 1 for c in clients]
    parts = {c: ({"edge": torch.ones(size), "signs": signs[c], "none": torch.zeros(9)}, 1.0) for c in clients}
    mean = aggregate(parts, clients, {}, secure).mean()
    assert (mean["edge"] == 1).all()
    assert (mean["none"] == 0).all()
    assert (mean["signs"] == (sum(signs).double() / 12).float()).all()


def test_the_server_and_the_others_have_no_secret_key():
    terms = Secure("ckks").terms(bytes(16), len(CLIENTS), 9.0)
    server, holder = HomomorphicServer(terms, CLIENTS), KeyHolder(terms)
    parties = {client: HomomorphicClient(terms, client) for client in CLIENTS}
    sums = {client: Sum.of({"w": torch.ones(5)}, 1.0) for client in CLIENTS}
    for client, party in parties.items():
        server.advertised(client, party.advertise(sums[client]))
    assert server.appointed() == 1
    told = server.published(1, holder.published())
    public = tenseal.context_from(encoding.decode(told)["key"])
    assert public.is_public()
    assert not public.has_secret_key()
    assert not tenseal.context_from(server.key).has_secret_key()
    encrypted = parties[4].encrypted(told, sums[4])
    assert parties[5].encrypted(told, sums[5]) != encrypted  # equal replies, other ciphertexts
    with pytest.raises(ValueError, match=r"secret.key"):
        tenseal.ckks_vector_from(public, encoding.decode(encrypted)["chunks"][0]).decrypt()
    naked = holder.secret
    with pytest.raises(RunError, match="the key holder 1 sent ValueError: a key that is not a public one"):
        server.published(1, encoding.encode({"key": naked}))
    with pytest.raises(RunError, match="not a public one"):
        parties[1].encrypted(encoding.encode({"key": naked, "outline": {}}), sums[1])
    with pytest.raises(RunError, match="sent 0 ciphertexts, expected 1"):
        server.took(8, encoding.encode({"chunks": []}))


def begun(size):
    """Parties of a sum of `size` numbers, up to the ciphertexts of all."""
    terms = Secure("ckks").terms(bytes(16), 3, 1.0)
    server, holder = HomomorphicServer(terms, range(3)), KeyHolder(terms)
    sums = [Sum.of({"w": torch.full((size,), float(c))}, 1.0) for c in range(3)]
    parties = [HomomorphicClient(terms, c) for c in range(3)]
    for client, party in enumerate(parties):
        server.advertised(client, party.advertise(sums[client]))
    told = server.published(0, holder.published())
    return server, holder, told, [party.encrypted(told, sums[c]) for c, party in enumerate(parties)], parties, sums


def altered(data, draw):
    """Bytes with one to four mistakes in them."""
    data = bytearray(data)
    for _ in range(int(torch.randint(1, 5, (), generator=draw))):
        at, what = (int(torch.randint(0, most, (), generator=draw)) for most in (min(len(data), 400), 4))
        if what == 0:
            data[at] ^= 1 << at % 8
        elif what == 1:
            data[at : at + 8] = b"\xff" * 8
        elif what == 2:
            data[at:at] = bytes(4)
        else:
            del data[at:]
            data += b"x"
    return bytes(data)


def test_hostile_keys_and_ciphertexts_end_in_a_sentence_and_never_end_the_process():
    server, holder, told, sent, parties, sums = begun(5)
    draw, chunk = stream(9, "hostile"), encoding.decode(sent[0])["chunks"][0]
    key, refused = encoding.decode(told)["key"], 0
    for turn in range(45):
        acts = (
            lambda: server.took(1, encoding.encode({"chunks": [altered(chunk, draw)]})),
            lambda: holder.opened(encoding.encode({"sums": [altered(chunk, draw)], "size": 7, "count": 3})),
            lambda: parties[1].encrypted(encoding.encode({"key": altered(key, draw), "outline": {}}), sums[1]),
        )
        try:
            acts[turn % 3]()
        except RunError as error:
            refused += 1
            assert "secure aggregation: " in str(error) and " sent " in str(error)
        server.present.clear()
        server.sums.clear()
    assert refused > 15
    for client in range(3):
        server.took(client, sent[client])
    total = server.total(0, holder.opened(server.arrived()), torch.device("cpu"))
    assert (total.mean()["w"] == 1.0).all()


def test_ciphertexts_of_another_number_of_numbers_are_refused():
    server, holder, told, *_ = begun(5)
    _, _, _, longer, *_ = begun(9)
    with pytest.raises(RunError, match=r"client 1 sent .*"):
        server.took(1, longer[1])
    context = tenseal.context_from(encoding.decode(told)["key"])
    for numbers in ([7.0], [1.0] * 6, [1.0] * 8):
        with pytest.raises(RunError, match=f"client 1 sent ValueError: a ciphertext of {len(numbers)} numbers"):
            server.took(1, encoding.encode({"chunks": [tenseal.ckks_vector(context, numbers).serialize()]}))
    with pytest.raises(RunError, match="the server sent 2 ciphertexts, expected 1"):
        holder.opened(encoding.encode({"sums": [b"", b""], "size": 7, "count": 3}))


def test_a_client_counts_once_and_strangers_never():
    """Two clients of three must stay, and one that speaks twice is not two."""
    server, holder, _, sent, parties, sums = begun(5)
    why = "a message of client {}, who is out of the sum or has spoken"
    for client in (1, 3):
        with pytest.raises(RunError, match=why.format(client)):
            server.advertised(client, parties[1].advertise(sums[1]))
    server.took(1, sent[1])
    for client in (1, 3):
        with pytest.raises(RunError, match=why.format(client)):
            server.took(client, sent[1])
    with pytest.raises(Abandoned, match="1 of 3 clients were left, 2 are needed"):
        server.arrived()
    server.took(2, sent[2])
    total = server.total(0, holder.opened(server.arrived()), torch.device("cpu"))
    assert (total.mean()["w"] == 1.5).all()


def test_a_client_that_comes_without_an_outline_is_nobody_to_hide_behind():
    """Two of three suffice; two have class 7, of whom one is lost, and the third never said what it has."""
    terms = Secure("ckks", clip=8.0).terms(bytes(16), 3, 1.0)
    server, holder = HomomorphicServer(terms, range(3)), KeyHolder(terms)
    sums = [Sum.of({"w": 1.0, "protos": protos}, 1.0) for protos in ({7: 5.0}, {7: 2.0}, {})]
    parties = [HomomorphicClient(terms, c) for c in range(3)]
    for c, party in enumerate(parties):
        server.advertised(c, party.advertise(sums[c] if c < 2 else None))
    told = server.published(server.appointed(), holder.published())
    for c in (0, 2):
        server.took(c, parties[c].encrypted(told, sums[c]))
    with pytest.raises(Abandoned, match=r"'protos.7' may be that of one client alone"):
        server.arrived()
    server.took(1, parties[1].encrypted(told, sums[1]))
    total = server.total(0, holder.opened(server.arrived()), torch.device("cpu"))
    assert total.mean() == {"w": 1.0, "protos": {7: 3.5}}


def test_a_process_that_dies_is_a_sentence_and_the_next_one_works():
    server, _, _, sent, *_ = begun(5)
    WORKER.stop()
    dying = [sys.executable, "-c", "import os, sys; sys.stdin.buffer.read(9); os.abort()"]
    WORKER.process = subprocess.Popen(dying, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with pytest.raises(RunError, match="client 1 sent bytes that crash what reads them"):
        server.took(1, sent[1])
    server.took(1, sent[1])
    assert server.present == [1]
    WORKER.process.kill()
    WORKER.process.wait()
    server.took(2, sent[2])


def test_a_lost_key_holder_or_too_few_clients_give_the_round_up():
    for phase in PHASES[1:]:
        noticed = "share" if phase == "share" else "unmask"
        with pytest.raises(Abandoned, match=f"given up at '{noticed}': the key holder 1 was lost"):
            aggregate(contributions(), CLIENTS, {phase: [1]}, Secure("ckks"), weight=9.0)
    for phase in ("advertise", "masked"):
        with pytest.raises(Abandoned, match=f"given up at '{phase}': 3 of 5 clients were left, 4 are needed"):
            aggregate(contributions(), CLIENTS, {phase: [4, 9]}, Secure("ckks"), weight=9.0)


def test_a_run_is_reproducible_and_that_of_plain_means_but_for_rounding():
    task = Toy((30, 20, 25, 35))
    made = [
        run("fedavg", task, rounds=2, eval_every=2, report=False, **how).metrics[-1]
        for how in ({}, {"secure": "ckks:clip=8"}, {"secure": "ckks:clip=8"})
    ]
    assert made[1]["global_test_loss"] == made[2]["global_test_loss"]  # the ciphertexts were others
    assert np.isclose(made[0]["global_test_loss"], made[1]["global_test_loss"], rtol=1e-5)
    assert made[1]["up_bytes"] > 20 * made[0]["up_bytes"]


def test_an_absent_extra_is_named(monkeypatch):
    monkeypatch.setattr("fedloom.boundary.secure.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"ckks needs the extra: pip install 'fedloom\[he\]'"):
        Secure.parse("ckks")
