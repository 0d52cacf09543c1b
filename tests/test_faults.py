"""Faults on the way: each is counted, named in the log, and survived; what is wrong never reaches the sum."""

import hashlib
import logging
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from problems import Quadratics, ran

import fedloom
from fedloom import encoding, message
from fedloom.boundary import faults, framing
from fedloom.boundary.faults import KINDS, Faults
from fedloom.calls import Call, Layer, Outcome
from fedloom.encoding import same
from fedloom.engines.forms import find_malformed
from fedloom.errors import CodecError, UsageError
from fedloom.message import Packed, Sparse
from fedloom.method import Method
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.random import numpy_stream
from fedloom.registry import catalogue
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace
from fedloom.vector import Layout, Vector

TOY = Toy((30, 20, 25, 35, 22, 28, 31, 19))
ALL = "+".join(f"{kind}:0.08" for kind in KINDS)


def made(kind, rounds=3, method=None, **settings):
    return ran(method or FedAvg(), TOY, rounds, faults=kind, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_is_counted_named_in_the_log_and_survived(kind, caplog):
    caplog.set_level(logging.INFO, "fedloom.boundary")
    run = made(f"{kind}:0.2", 4)
    rows = run.record.metrics
    drawn = Faults.of(f"{kind}:0.2", 0)
    for row in rows:
        call = Call("mean", "local", tuple(range(8)), {}, {}, "train", row["round"], 0)
        hit = [client for client in range(8) if drawn.fate(call, client)]
        assert row[f"fault/{kind}"] == len(hit)
        assert row["replies"] == 8 - len(hit) * (kind != "duplicate")
        assert row["fault/refused"] == (0 if kind in ("lost", "late") else len(hit))
        lines = [line for line in caplog.messages if line.startswith(f"round {row['round']}, local: {kind}, ")]
        assert len(lines) == (1 if hit else 0)
    assert sum(row[f"fault/{kind}"] for row in rows) > 0
    assert run.server.model.flat.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "duplicate"])
def test_the_result_is_that_of_the_remaining_clients_bitwise(kind):
    hit, lost = made(f"{kind}:0.2"), made("lost:0.2")
    assert same(hit.server.model, lost.server.model)


def test_a_duplicate_counts_once_and_its_bytes_twice():
    plain, twice = ran(FedAvg(), TOY, 2), made("duplicate:1.0", 2)
    assert same(plain.server.model, twice.server.model)
    for one, other in zip(plain.record.metrics, twice.record.metrics, strict=True):
        assert other["up_bytes"] == 2 * one["up_bytes"]
        assert other["gradient_steps"] == one["gradient_steps"]
        assert (other["fault/duplicate"], other["replies"]) == (8, 8)


def test_late_replies_come_a_round_late_and_are_refused_as_stale():
    rows = made("late:0.4", 4).record.metrics
    assert rows[0]["fault/stale"] == 0
    assert [row["fault/stale"] for row in rows[1:]] == [row["fault/late"] for row in rows[:-1]]


def test_the_door_alone_changes_nothing():
    assert same(ran(FedAvg(), TOY, 2).server.model, made("lost:0").server.model) is False
    assert same(ran(FedAvg(), TOY, 3).server.model, made("lost:0").server.model)


def test_everything_at_once_on_every_engine_and_resumed(tmp_path):
    plain = trace(made(ALL, 4))
    assert difference(plain, trace(made(ALL, 4, engine="loopback"))) is None
    assert difference(plain, trace(made(ALL, 4, engine="pool", workers=2))) is None

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    settings = {"faults": ALL, "rounds": 4, "eval_every": 4, "report": False}
    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", TOY, out=tmp_path / "run", on_round=stop, **settings)
    again = fedloom.resume(tmp_path / "run", TOY, report=False)
    whole = fedloom.run("fedavg", TOY, **settings)
    assert same(again.model, whole.model)
    stale = [[row["fault/stale"] for row in run.metrics] for run in (again, whole)]
    assert stale[0] == stale[1]


def test_if_nobody_gets_through_the_server_keeps_its_values():
    run = made("corrupt:1.0", 2)
    assert same(run.server.model, Vector(run.site.initial.flat, run.site.initial.layout))
    assert "none of the 8 clients replied" in run.record.metrics[0]["note"]


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_every_method_survives(name):
    if {"lost", "faults"} & next(e for e in catalogue() if e.name == name).load(Method).refuses.keys():
        with pytest.raises(UsageError, match="does not go with faults="):
            ran(fedloom.method.build(name), TOY, 1, faults="corrupt:0.1")
        return
    lab = Lab(next(e for e in catalogue() if e.name == name).load(Method))
    kinds = [need for need in lab.cls.needs if need not in ("public", "shared_data")]
    task = lab.toy() if kinds else TOY
    if not any(call.kind == "train" for call in lab.method.plan):
        pytest.skip("its clients do nothing in a round")
    lab.experiment(task, faults="corrupt:0.1+duplicate:0.2+late:0.1+nan:0.1+shape:0.1", rounds=2, eval_every=2)


@pytest.mark.parametrize("compress", ["topk:0.2", "qsgd:4", "sign+zstd", "lowrank:2"])
def test_compressed_replies_are_judged_as_what_they_stand_for(compress):
    pytest.importorskip("zstandard")
    rows = made(ALL, 5, compress=compress).record.metrics
    assert sum(row["fault/refused"] for row in rows) > 0 and all(row["replies"] for row in rows)


def test_under_a_robust_rule_and_in_virtual_time():
    rows = made(ALL, 4, aggregate="median").record.metrics
    assert sum(row["fault/refused"] for row in rows) > 0
    waited = made(ALL, 4, speed="uniform:0.5,2", deadline=1.0, cohort=4, overselect=1.5).record.metrics
    assert all(0 < row["replies"] <= 4 for row in waited)


def test_a_rule_that_has_too_few_replies_left_keeps_the_model():
    run = made("corrupt:0.7", 2, aggregate="krum:f=2")
    assert same(run.server.model, Vector(run.site.initial.flat, run.site.initial.layout))
    assert "krum with f=2 needs" in run.record.metrics[0]["note"]


def test_work_that_is_submitted_meets_them_too():
    names = {entry.name for entry in catalogue() if entry.folder == "asynchronous"}
    for name in sorted(names)[:2]:
        run = ran(fedloom.method.build(name), TOY, 6, faults=ALL)
        assert sum(row.get("fault/refused", 0) for row in run.record.metrics) > 0
    run = ran(Overlapping(), TOY, 6, faults="duplicate:0.3+shape:0.15")
    rows = run.record.metrics
    assert sum(row["fault/shape"] for row in rows) > 0 and run.server.model.flat.isfinite().all()


class Overlapping(FedAvg):
    """Submits everybody who is idle and takes four at a time."""

    def round(self, server, cohort):
        cohort.idle.submit(self.local, model=server.model)
        replies = cohort.wait(4)
        assert len({reply.client for reply in replies}) == len(replies)
        if replies:
            server.model = server.model + replies.mean("delta").delta


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("corupt:0.1", "did you mean 'corrupt'"),
        ("corrupt", "its share"),
        ("corrupt:1.5", "its share"),
        ("corrupt:0.1,size=3", "its share"),
        ("nan:0.1+nan:0.1", "twice"),
        ("nan:0.7+inf:0.7", "more than 1"),
    ],
)
def test_a_text_that_makes_no_sense(text, why):
    with pytest.raises(UsageError, match=why):
        Faults.of(text, 0)


def test_shares_are_what_they_say():
    drawn = Faults.of("corrupt:0.2+nan:0.1", 5)
    counts = {"corrupt": 0, "nan": 0, None: 0}
    for client in range(4000):
        counts[drawn.fate(Call("call", "f", (), {}, {}, "train", 3, 0), client)] += 1
    assert counts["corrupt"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert counts["nan"] / 4000 == pytest.approx(0.1, abs=0.02)


def asked(function="local", round=1, nth=0, kind="train", clients=range(8)):
    return Call("call", function, tuple(clients), {}, {}, kind, round, nth)


def fates(seed=0, **call):
    return [Faults.of("nan:0.3+lost:0.3", seed).fate(asked(**call), client) for client in range(64)]


def test_fates_depend_on_seed_round_call_and_client_alone():
    assert len({str(fates()), str(fates(seed=1)), str(fates(round=2)), str(fates(nth=1))}) == 4
    assert fates() == fates(function="other", clients=(5,)) and len(set(fates())) == 3
    for kind in ("setup", "finish", "evaluate"):
        assert set(fates(kind=kind)) == {None}, "faults happen in rounds only"


class Passing(Layer):
    """Compression that cannot make anything of client 5's reply."""

    def arrive(self, call, client, reply, site=None):
        if client == 5:
            raise CodecError("what client 5 sent contradicts itself")
        return reply


def office(*layers):
    """As much of the books as the door needs."""
    site = SimpleNamespace(layers=layers, device=torch.device("cpu"))
    return SimpleNamespace(memory={}, notes={}, judged={}, asked_in={}, site=site)


def outcome(client, number=1.0, **more):
    return Outcome(client, {"x": torch.full((3,), number)}, {"x": 30}, {"loss": 1.0}, 4, {"s": 1}, **more)


def carried(text, outcomes, call=None, books=None):
    return Faults.of(text, 0).outcomes(books or office(), call or asked(), outcomes)


def test_a_duplicate_brings_no_logs_steps_and_state_of_its_own():
    first, second = carried("duplicate:1.0", [outcome(3)])
    assert (first.logs, first.steps, first.state, first.fault) == ({"loss": 1.0}, 4, {"s": 1}, None)
    assert (second.logs, second.steps, second.state, second.fault) == ({}, 0, None, "a duplicate")


def test_late_replies_answer_a_call_of_their_own_function_in_a_later_round():
    books, told = office(), []
    for function, round, nth in [("a", 1, 0), ("a", 1, 1), ("b", 2, 0), ("a", 2, 1), ("a", 3, 0), ("b", 3, 1)]:
        books.notes.clear()
        carried("late:1.0", [outcome(3)] if round == 1 else [], asked(function, round, nth), books)
        told.append(books.notes["fault/stale"])
    assert told == [0, 0, 0, 2, 0, 0]


def test_the_calls_of_a_round_are_counted_together():
    books = office()
    for nth in range(3):
        carried("lost:1.0", [outcome(client) for client in range(nth + 1)], asked(nth=nth), books)
    assert books.notes["fault/lost"] == 6


def test_everything_that_is_wrong_is_told_of_whom_it_concerns():
    bad = [
        outcome(0),
        outcome(1, float("nan")),
        outcome(9),
        outcome(5),
        outcome(2, fault="spoilt on its way"),
        outcome(0),
    ]
    books = office(Passing())
    got = {(o.client, place): o.fault for place, o in enumerate(carried(None, bad, books=books))}
    assert got == {
        (0, 0): None,
        (1, 1): "NaN or infinite numbers",
        (9, 2): "nobody asked this client",
        (5, 3): "what client 5 sent contradicts itself",
        (2, 4): "spoilt on its way",
        (0, 5): "a duplicate",
    }
    assert books.judged == {0: 1.0, 1: 0.0, 9: 0.0, 5: 0.0, 2: 0.0}, "a duplicate is no offence"
    assert books.notes["fault/refused"] == 5


def test_whoever_is_turned_away_already_suffers_no_fault():
    books = office()
    (only,) = carried("lost:1.0", [outcome(2, fault="spoilt on its way")], books=books)
    assert only.fault == "spoilt on its way" and books.notes["fault/lost"] == 0


def test_who_is_away_is_not_judged():
    books = office()
    carried("lost:0.5+late:0.5", [outcome(client) for client in range(8)], books=books)
    assert books.judged == {}


SENT = {"n": 2, "d": {"w": [torch.ones(3, dtype=torch.float64), torch.ones(2)]}, "y": torch.ones(4)}


@pytest.mark.parametrize("kind", ["nan", "inf", "dtype", "shape"])
def test_the_first_field_of_numbers_is_spoilt_on_its_way(kind):
    before = message.copy(SENT)
    spoilt = faults.spoilt(SENT, kind)
    (bad, rest), y = spoilt["d"]["w"], spoilt["y"]
    assert same(SENT, before), "the client keeps what it sent"
    assert rest.tolist() == [1, 1] and y.tolist() == [1] * 4 and spoilt["n"] == 2
    if kind in ("nan", "inf"):
        assert str(bad.tolist()) == str([float(kind), 1.0, 1.0]) and bad.dtype == torch.float64
    elif kind == "dtype":
        assert (bad.dtype, bad.tolist()) == (torch.float32, [1, 1, 1])
        assert faults.spoilt({"x": torch.ones(1)}, kind)["x"].dtype == torch.float64
    else:
        assert bad.numel() != 3
    assert faults.spoilt({"n": 2, "empty": torch.ones(0), "whole": torch.ones(2).int()}, kind) is None


def test_a_frame_may_announce_so_many_times_the_middle_reply():
    """One client cannot lift the bound for itself."""

    def frame_length(*sizes):
        return faults.allowed([replace(outcome(k), sizes={"x": size - 1, "e": 1}) for k, size in enumerate(sizes)])

    assert frame_length(100, 100, 10**9) == 64 * 100 + 2**16
    assert frame_length(100, 10**9) == 64 * 100 + 2**16, "of two the smaller"
    assert frame_length(2**30) == framing.LIMIT and frame_length() == 2**16


class Last:
    """Draws the largest number there is."""

    def integers(self, stop, size=None):
        return stop - 1 if size is None else numpy_stream(0).integers(stop - 1, stop, size)


def test_a_truncated_frame_lacks_a_byte_at_least():
    sealed = framing.pack_frame(b"payload", 7, 3, 1)
    assert faults.mangled(sealed, "truncate", Last()) == sealed[:-1]


# Frames


def test_a_frame_tells_what_was_sealed():
    opened = framing.unpack_frame(framing.pack_frame(b"payload", 7, 3, 1))
    assert (opened.client, opened.round, opened.nth, bytes(opened.payload)) == (7, 3, 1, b"payload")
    assert framing.unpack_frame(framing.pack_frame(b"", -1, 0, 0)).payload.nbytes == 0


def test_the_first_bytes_of_a_frame_are_those_of_its_description():
    front = b"MHF\x01" + struct.pack("<Q", 7) + struct.pack("<q", -2) + struct.pack("<I", 3) + struct.pack("<I", 1)
    digest = hashlib.blake2b(front + b"payload", digest_size=16).digest()
    assert framing.pack_frame(b"payload", -2, 3, 1) == front + digest + b"payload"


def test_a_whole_frame_of_another_version_is_none():
    front = framing.pack_frame(b"payload", 7, 3, 1)[: framing.FRONT.size].replace(b"MHF\x01", b"MHF\x02")
    with pytest.raises(CodecError, match="not a frame: it begins with"):
        framing.unpack_frame(front + hashlib.blake2b(front + b"payload", digest_size=16).digest() + b"payload")


def test_every_bit_and_every_length_of_a_frame_is_guarded():
    sealed = framing.pack_frame(encoding.encode({"n": 3}), 7, 3, 1)
    for bit in range(8 * len(sealed)):
        octets = bytearray(sealed)
        octets[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            framing.unpack_frame(octets)
    for length in range(len(sealed)):
        with pytest.raises(CodecError):
            framing.unpack_frame(sealed[:length])
    with pytest.raises(CodecError, match="too long"):
        framing.unpack_frame(sealed + b"x")


def test_a_length_over_the_limit_is_told_from_the_head_alone():
    head = framing.pack_frame(bytes(1000), 0, 1, 0)[: framing.HEAD]
    assert framing.frame_length(head) == framing.frame_length(head, 1000) == 1000
    with pytest.raises(CodecError, match="cut short"):
        framing.frame_length(head[:-1])
    with pytest.raises(CodecError, match="over the limit of 999"):
        framing.unpack_frame(framing.pack_frame(bytes(1000), 0, 1, 0), 999)
    with pytest.raises(CodecError, match="over the limit of 999"):
        framing.frame_length(head, 999)


@pytest.mark.parametrize("kind", faults.FRAMED)
def test_mangled_frames_are_never_opened(kind):
    sealed = framing.pack_frame(encoding.encode({"delta": torch.ones(50)}), 0, 1, 0)
    for seed in range(200):
        damaged = faults.mangled(sealed, kind, numpy_stream(seed, "mangle"))
        assert damaged != sealed
        with pytest.raises(CodecError):
            framing.unpack_frame(damaged)


# The door


LAYOUT, OTHER = (Layout(("w",), ((size,),), 1) for size in (4, 5))


def vector(layout=LAYOUT, dtype=torch.float32):
    return Vector(torch.ones(layout.size, dtype=dtype), layout)


def refused(replies, verb="mean", shared=None, own=None, whole=False, before=None):
    call = Call(verb, "local", tuple(range(len(replies))), shared or {}, own or {}, "train", 1, 0)
    return set(find_malformed(call, dict(enumerate(replies)), whole, {} if before is None else before))


GOOD = {"delta": vector(), "n": 3}
BAD = [
    {"delta": vector(OTHER), "n": 3},
    {"delta": vector(dtype=torch.float64), "n": 3},
    {"delta": torch.ones(4), "n": 3},
    {"delta": Sparse(torch.tensor([0]), torch.ones(1), 4), "n": 3},
    {"delta": [vector()], "n": 3},
    {"delta": None, "n": 3},
    {"delta": vector(), "n": "three"},
    {"delta": vector(), "n": float("nan")},
    {"delta": vector() * float("inf"), "n": 3},
]


def test_layouts_sizes_and_containers_are_told_apart():
    like = Layout(("v",), ((4,),), 1)
    few = [Sparse(torch.tensor([0]), torch.ones(1), size) for size in (4, 5)]
    pairs = [(vector(), vector(like)), few, ([1.0], (1.0,)), ({"a": 1.0}, {"a": "x"}), ({"a": 1.0}, [1.0])]
    pairs += [
        (torch.ones(2, 3), torch.ones(2, 4)),
        (torch.ones(()), torch.ones(1)),
        (torch.ones(2), torch.ones(2).int()),
    ]
    for one, other in pairs:
        for verb in ("mean", "call"):
            assert refused([{"x": one}] * 4 + [{"x": other}], verb) == {4}
    rows = [{"x": torch.ones(2)}] * 4 + [{"x": torch.ones(3)}]
    assert refused(rows, "mean") == {4} and refused(rows, "call") == set()


def test_who_sends_nan_has_no_vote():
    nan = {"delta": vector(OTHER) * float("nan")}
    assert refused([nan, nan, nan, {"delta": vector()}, {"delta": vector()}]) == {0, 1, 2}


def test_what_only_half_of_the_replies_have_need_not_be_there():
    assert refused([GOOD, GOOD, {"n": 3}, {"n": 3}], whole=True) == set()
    assert refused([GOOD, {"n": 3}, {"n": 3}], whole=True) == set()


def test_an_own_message_is_no_excuse_where_a_sum_is_taken():
    assert refused([GOOD, GOOD, {"delta": vector(OTHER), "n": 3}], own={2: {"model": vector(OTHER)}}) == {2}


def test_the_message_and_what_was_taken_before_count_twice_each():
    before = {}
    assert refused([GOOD], before=before) == set()
    other = {"delta": vector(OTHER), "n": 3}
    assert refused([other] * 7 + [GOOD], shared={"model": vector()}, before=before) == {*range(7)}, "4 * (1 + 1) votes"


def test_a_form_that_few_have_is_not_expected_from_then_on():
    before = {}
    forms = [{"x": torch.ones(1, size)} for size in range(2, 6)]
    assert refused(forms, "call", before=before) == set() and before == {}
    assert refused([{"x": torch.ones(1, 9)}] * 2 + forms[:2], "call", before=before) == set()


@pytest.mark.parametrize("verb", ["mean", "call"])
@pytest.mark.parametrize("bad", BAD)
def test_a_reply_of_another_form_is_turned_away(bad, verb):
    assert refused([GOOD, GOOD, bad, GOOD, GOOD], verb) == {2}


def test_what_a_rule_needs_must_be_there():
    partial = {"n": 3}
    assert refused([GOOD, partial, GOOD]) == set(), "a mean takes parts"
    assert refused([GOOD, partial, GOOD], whole=True) == {1}


def test_what_the_message_has_and_what_was_taken_before_count_twice():
    other = {"delta": vector(OTHER)}
    assert refused([other, GOOD], shared={"model": vector()}) == {0}
    assert refused([other, GOOD], shared={"model": vector(OTHER)}) == {1}
    before = {}
    assert refused([GOOD, GOOD], before=before) == set()
    assert refused([other], before=before) == {0}
    assert refused([other, other, GOOD], before=before) == {0, 1}
    assert refused([other], shared={"model": vector(OTHER)}, before=before) == set(), "models may grow"
    before = {}
    assert refused([GOOD, GOOD], before=before) == set()
    assert refused([other] * 5 + [GOOD], before=before) == {5}, "what most agree on wins in the end"


def test_replies_that_may_differ_pass():
    mixed = [{"model": vector(OTHER if k % 2 else LAYOUT)} for k in range(4)]
    assert refused(mixed, "call") == set(), "no form that most have"
    few = [{"model": vector(OTHER if k == 3 else LAYOUT)} for k in range(6)]
    assert refused(few, "call") == {3}
    assert refused(few, "call", own={3: {"model": vector(OTHER)}}) == set(), "it was sent such a model"
    assert refused([{"model": torch.ones(1, 5)}, *mixed], "call") == {0}, "another kind altogether"
    assert refused([{"model": vector(dtype=torch.float64)}, *mixed], "call") == {0}, "another type of numbers"
    assert refused([{"model": torch.ones(1, 5)}, mixed[0]], "call", shared={"model": vector()}) == {0}
    assert refused([{"loss": None}, {"loss": 1.0}, {"loss": 2.0}], "call") == {0}, "two thirds have a number"
    assert refused([{"loss": None}, {"loss": 1.0}], "call") == set()
    lengths = [
        {"scores": torch.ones(k + 1, 3), "mask": Packed(torch.ones(k + 1, 2, dtype=torch.bool), 1)} for k in range(4)
    ]
    assert refused(lengths, "call") == set(), "as many rows as samples"
    assert refused([*lengths, {"scores": torch.ones(3, 4)}], "call") == {4}
    classes = [{"protos": {c: torch.ones(3) for c in range(k + 1)}} for k in range(4)]
    assert refused(classes) == set(), "classes that a client lacks"


def test_problems_in_double_precision_pass_too():
    quadratics = Quadratics()
    plain, checked = ran(FedAvg(), quadratics, 3), ran(FedAvg(), quadratics, 3, faults="lost:0")
    assert same(plain.server.model, checked.server.model)
