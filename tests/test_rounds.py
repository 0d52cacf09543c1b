"""Rounds one at a time, runs that end early, and runs that go on for longer: always the bits of an unbroken run."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

import fedloom
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.quality import ACCURACY, RMSE
from fedloom.runs.choice import stale
from fedloom.tasks.toy import Toy

DIGITS = {"task": "digits", "clients": 3, "report": False}
TIMES = ("seconds", "eval_seconds", "virtual_seconds")


def bits(run):
    return run.model.flat.numpy().tobytes()


def rows(run):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in run.metrics]


def ledger(run):
    return list(run.ledger)


def stop_at(round):
    return lambda row: "stop" if row["round"] == round else None


# Methods with a state of the server, states of clients, and none.
METHODS = ("fedavg", "scaffold", "fedbuff:buffer=2")


# -- one at a time


@pytest.mark.parametrize("method", METHODS)
def test_rounds_left_early_and_resumed_are_those_of_an_unbroken_run(method, tmp_path):
    whole = fedloom.run(method, **DIGITS, rounds=5)
    seen = []
    for row in fedloom.rounds(method, **DIGITS, rounds=5, out=tmp_path / "run"):
        seen.append(row)
        if row["round"] == 3:
            break
    left = fedloom.Run(tmp_path / "run")
    assert left.manifest["status"] == "stopped" and left.metrics == seen
    trained = []
    again = fedloom.resume(tmp_path / "run", on_round=trained.append, report=False)
    assert [row["round"] for row in trained] == [4, 5]  # the checkpoint is of the round where the loop was left
    assert bits(again) == bits(whole) and rows(again) == rows(whole) and ledger(again) == ledger(whole)
    assert again.manifest["status"] == "finished"


def test_rounds_to_their_end_are_the_run(tmp_path):
    whole = fedloom.run("fedavg", **DIGITS, rounds=3)
    rounds = fedloom.rounds("fedavg", **DIGITS | {"report": True}, rounds=3, out=tmp_path / "run")
    assert rounds.run.metrics == [] and rounds.run.manifest["status"] == "running"
    assert [row["round"] for row in rounds] == [1, 2, 3]
    assert bits(rounds.run) == bits(whole) and rows(rounds.run) == rows(whole)
    assert rounds.run.manifest["status"] == "finished" and (tmp_path / "run" / "report.html").exists()
    with pytest.raises(StopIteration):
        next(rounds)


def test_between_rounds_the_program_has_its_own_settings_of_pytorch():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        for _ in fedloom.rounds("fedavg", Toy(), rounds=2):
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_two_runs_take_turns_and_neither_sees_the_other():
    alone = [fedloom.run("fedavg", **DIGITS, rounds=3, seed=seed) for seed in (0, 1)]
    both = [fedloom.rounds("fedavg", **DIGITS, rounds=3, seed=seed) for seed in (0, 1)]
    for _ in range(3):
        for rounds in both:
            next(rounds)
            torch.rand(5)  # the program's own draws
    assert [next(rounds, None) for rounds in both] == [None, None]
    assert [bits(rounds.run) for rounds in both] == [bits(run) for run in alone]


def test_rounds_that_are_dropped_or_closed_stop_their_run(tmp_path):
    out = tmp_path / "dropped"
    rounds = fedloom.rounds("fedavg", Toy(), rounds=3, out=out, report=False)
    next(rounds)
    del rounds
    assert fedloom.Run(out).manifest["status"] == "stopped"
    out = tmp_path / "never"
    fedloom.rounds("fedavg", Toy(), rounds=3, out=out, report=False).close()
    assert fedloom.Run(out).manifest["status"] == "stopped"
    with fedloom.rounds("fedavg", Toy(), rounds=3, out=tmp_path / "with", report=False) as rounds:
        next(rounds)
    assert rounds.run.manifest["status"] == "stopped"
    assert len(fedloom.resume(tmp_path / "with", Toy(), report=False).metrics) == 3


def test_what_is_wrong_is_told_before_the_first_round():
    with pytest.raises(UsageError, match="unknown setting 'round'; did you mean 'rounds'"):
        fedloom.rounds("fedavg", Toy(), round=3)


# -- a callback that ends the run


def test_a_callback_ends_the_run_as_if_it_had_had_so_many_rounds():
    short = fedloom.run("scaffold", **DIGITS, rounds=2)
    stopped = fedloom.run("scaffold", **DIGITS, rounds=9, on_round=stop_at(2))
    assert bits(stopped) == bits(short) and rows(stopped) == rows(short) and ledger(stopped) == ledger(short)
    assert stopped.manifest["status"] == "finished"
    assert stopped.manifest["stopped_because"] == "on_round said stop"
    assert "stopped_because" not in short.manifest


@pytest.mark.parametrize("method", ["ccvr", "fcp:inner=fedavg"])
def test_an_ended_run_has_what_its_method_does_after_the_last_round(method):
    short = fedloom.run(method, **DIGITS, rounds=2)
    stopped = fedloom.run(method, **DIGITS, rounds=9, on_round=stop_at(2))
    assert bits(stopped) == bits(short) and stopped.final.keys() == short.final.keys()
    assert stopped.final["global_test_accuracy"] == short.final["global_test_accuracy"]
    assert [row["round"] for row in stopped.metrics] == [1, 2]
    for name in ("up_bytes", "down_bytes"):  # those of both, and of an evaluation more
        assert stopped.final[name] == short.final[name]


@dataclass(frozen=True)
class Doubled(FedAvg):
    """Is what is judged what is kept?"""

    def observe(self, server, clients):
        return server.model * 2


def test_the_model_of_an_ended_run_is_what_was_judged():
    short = fedloom.run(Doubled(lr=1e-9), **DIGITS, rounds=2)
    stopped = fedloom.run(Doubled(lr=1e-9), **DIGITS, rounds=4, on_round=stop_at(2))
    assert stopped.selected["round"] == 1  # the last round is not the chosen one
    name = "last.safetensors"
    assert (stopped.path / "model" / name).read_bytes() == (short.path / "model" / name).read_bytes()
    assert bits(stopped) == bits(short) and stopped.spec.rounds == 4


def test_an_ended_run_is_evaluated_in_its_last_round():
    short = fedloom.run("fedavg", **DIGITS, rounds=2, eval_every=5)
    stopped = fedloom.run("fedavg", **DIGITS, rounds=9, eval_every=5, on_round=stop_at(2))
    assert rows(stopped) == rows(short) and stopped.final["round"] == 2


def test_a_callback_that_says_stop_in_the_last_round_changes_nothing():
    whole = fedloom.run("fedavg", **DIGITS, rounds=2, on_round=stop_at(2))
    assert len(whole.metrics) == 2 and "stopped_because" not in whole.manifest


@pytest.mark.parametrize("answer", [None, True, 1, 3.5, torch.ones(2)])
def test_what_a_callback_happens_to_return_ends_nothing(answer):
    assert len(fedloom.run("fedavg", Toy(), rounds=2, on_round=lambda row: answer).metrics) == 2


def test_a_slip_in_the_answer_is_told():
    with pytest.raises(UsageError, match="on_round answered 'Stop'; it answers 'stop' to end the run, or nothing"):
        fedloom.run("fedavg", Toy(), rounds=2, on_round=lambda row: "Stop")


def test_a_run_that_a_callback_ended_goes_on_where_it_is_resumed(tmp_path):
    whole = fedloom.run("scaffold", **DIGITS, rounds=4)
    fedloom.run("scaffold", **DIGITS, rounds=4, on_round=stop_at(2), out=tmp_path / "run")
    again = fedloom.resume(tmp_path / "run", report=False)
    assert bits(again) == bits(whole) and rows(again) == rows(whole)
    assert "stopped_because" not in again.manifest


# -- validation ends the run


def judged(values, main=ACCURACY, every=1):
    return [{"round": every * (n + 1), f"validation_{main.name}": value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "patience", "delta", "since"),
    [
        ([0.1, 0.2, 0.3], 1, 0.0, None),
        ([0.3, 0.2], 1, 0.0, 1),
        ([0.3, 0.3], 1, 0.0, 1),  # as good is not better
        ([0.3, 0.2, 0.2], 2, 0.0, 1),
        ([0.3, 0.2], 2, 0.0, None),
        ([0.3, 0.2, 0.4, 0.4], 2, 0.0, None),  # counted from the best
        ([0.3, 0.2, 0.4, 0.4, 0.1], 2, 0.0, 3),
        ([0.30, 0.34, 0.38], 2, 0.05, None),  # each step is small, and both are not: from the one that counted
        ([0.30, 0.34, 0.34], 2, 0.05, 1),
        ([], 1, 0.0, None),
    ],
)
def test_rounds_are_counted_from_the_last_that_was_better(values, patience, delta, since):
    assert stale(judged(values), patience, delta) == since


def test_lower_is_better_where_it_is():
    assert stale(judged([3.0, 2.0, 2.5], RMSE), 1, 0.0) == 2
    assert stale(judged([3.0, 2.0, 1.5], RMSE), 1, 0.0) is None


def test_patience_is_in_rounds_however_seldom_they_are_evaluated():
    assert stale(judged([0.3, 0.2], every=5), 5, 0.0) == 5
    assert stale(judged([0.3, 0.2], every=5), 6, 0.0) is None


def test_validation_ends_a_run_as_if_it_had_had_so_many_rounds(tmp_path):
    early = fedloom.run("scaffold", **DIGITS, lr=0.2, rounds=60, patience=2, out=tmp_path / "run")
    last = early.metrics[-1]["round"]
    values = [row["validation_accuracy"] for row in early.metrics]
    assert last < 60 and max(values) == max(values[:-2]) == values[last - 3]  # and not sooner:
    assert all(max(values[:n]) > max(values[: n - 2]) for n in range(3, last))
    assert early.manifest["stopped_because"] == (f"patience=2: validation has not become better since round {last - 2}")
    short = fedloom.run("scaffold", **DIGITS, lr=0.2, rounds=last)
    assert bits(early) == bits(short) and rows(early) == rows(short)
    again = fedloom.resume(tmp_path / "run", report=False)  # it stays over
    assert len(again.metrics) == last and again.manifest["stopped_because"] == early.manifest["stopped_because"]


def test_a_broken_run_with_patience_ends_where_an_unbroken_one_does(tmp_path):
    settings = {**DIGITS, "lr": 0.2, "rounds": 60, "patience": 2}
    whole = fedloom.run("fedavg", **settings)
    for row in fedloom.rounds("fedavg", **settings, out=tmp_path / "run"):
        if row["round"] == len(whole.metrics) - 1:
            break
    again = fedloom.resume(tmp_path / "run", report=False)
    assert rows(again) == rows(whole) and again.manifest["stopped_because"] == whole.manifest["stopped_because"]


def test_min_delta_ends_a_run_sooner_and_is_told():
    plain = fedloom.run("fedavg", **DIGITS, rounds=60, patience=2)
    strict = fedloom.run("fedavg", **DIGITS, rounds=60, patience=2, min_delta=0.05)
    assert len(strict.metrics) < len(plain.metrics)
    assert "better by more than min_delta=0.05 since" in strict.manifest["stopped_because"]


STREAM = "would end the run before all tasks have come"
REFUSED = {
    "no validation rows": ({"patience": 2, "validation": 0}, "goes by validation rows, and this problem has none"),
    "it could never stop": ({"patience": 3}, "patience is 3 and rounds 3: the run is over before it could stop"),
    "min_delta alone": ({"min_delta": 0.1}, "min_delta is 0.1 and says how patience counts; give patience too"),
    "nothing to wait for": ({"patience": 0}, "patience is 0; it must be at least 1"),
    "a negative difference": ({"patience": 1, "min_delta": -0.1}, "min_delta is -0.1; it must be at least 0"),
    "tasks that come one by one": ({"patience": 2, "problem": "stream:2,rounds=2"}, STREAM),
}


@pytest.mark.parametrize("case", REFUSED)
def test_patience_that_cannot_be_is_refused(case):
    settings, told = REFUSED[case]
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", **DIGITS, **{"rounds": 3} | settings)


# -- more rounds


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_that_goes_on_is_the_longer_run(method, tmp_path):
    whole = fedloom.run(method, **DIGITS, rounds=5)
    fedloom.run(method, **DIGITS, rounds=3, out=tmp_path / "run")
    longer = fedloom.resume(tmp_path / "run", rounds=5, report=False)
    assert bits(longer) == bits(whole) and rows(longer) == rows(whole) and ledger(longer) == ledger(whole)
    assert longer.spec.rounds == fedloom.Run(tmp_path / "run").spec.rounds == 5
    assert longer.manifest["notes"] == ["after round 3: the run goes on to 5 rounds in place of 3"]
    fourth = fedloom.resume(tmp_path / "run", report=False)  # and stays so long
    assert len(fourth.metrics) == 5


def test_the_command_line_goes_on_too(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["run", "fedavg", "--clients", "3", "--rounds", "2", "--out", out]) == 0
    assert main(["resume", out, "--rounds", "4"]) == 0
    assert bits(fedloom.Run(out)) == bits(fedloom.run("fedavg", **DIGITS, rounds=4))
    assert main(["resume", out, "--rounds", "3"]) == 2
    assert "has 4 rounds; it can go on to more, not to 3" in capsys.readouterr().err


def test_a_stopped_run_may_be_made_longer_or_shorter(tmp_path):
    for _ in fedloom.rounds("scaffold", **DIGITS, rounds=9, out=tmp_path / "run"):
        break
    shorter = fedloom.resume(tmp_path / "run", rounds=3, report=False)
    assert bits(shorter) == bits(fedloom.run("scaffold", **DIGITS, rounds=3))


OTHERS = {
    "a schedule": ("fedavg", {"schedule": "cosine"}, "was planned for rounds=2, by which schedule=cosine goes"),
    "noise for all rounds": ("fedavg", {"dp": "client:noise=auto,epsilon=8"}, "by which dp=client:noise=auto"),
    "what comes last": ("ccvr", {}, "is over, and ccvr has done what it does after the last round"),
    "one round": ("fedkd_oneshot", {}, "trains in one round, however many are asked for"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_that_would_have_been_another_is_refused_and_left_as_it_was(case, tmp_path):
    method, settings, told = OTHERS[case]
    if case == "one round":
        found = [cls for name in dir(fedloom) if getattr(cls := getattr(fedloom, name), "one_shot", False)]
        method, settings = found[0], {"shared_data": 0.1} if "shared_data" in found[0].needs else {}
    if "dp" in settings:
        pytest.importorskip("dp_accounting")
    run = fedloom.run(method, **DIGITS, rounds=2, out=tmp_path / "run", **settings)
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match=told):
        fedloom.resume(tmp_path / "run", rounds=4, report=False)
    assert before == {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}


def test_a_schedule_that_does_not_go_by_rounds_goes_on(tmp_path):
    whole = fedloom.run("fedavg", **DIGITS, rounds=4, schedule="exponential:0.9")
    fedloom.run("fedavg", **DIGITS, rounds=2, schedule="exponential:0.9", out=tmp_path / "run")
    assert bits(fedloom.resume(tmp_path / "run", rounds=4, report=False)) == bits(whole)


# -- initial weights from a file


@pytest.fixture
def trained():
    return fedloom.run("fedavg", **DIGITS, rounds=2)


def tensors(run):
    return {name: run.model[name].contiguous() for name in run.model}


def test_a_run_begins_with_the_weights_of_a_file(trained, tmp_path):
    file = trained.path / "model.safetensors"
    still = fedloom.run("fedavg", **DIGITS, rounds=1, init=file, lr=1e-30)
    assert bits(still) == bits(trained)
    torch.save(tensors(trained), tmp_path / "model.pt")  # noqa: TID251
    again = fedloom.run("scaffold", **DIGITS, rounds=2, init=str(tmp_path / "model.pt"))
    same = fedloom.run("scaffold", **DIGITS, rounds=2, init=file)
    assert bits(again) == bits(same) != bits(fedloom.run("scaffold", **DIGITS, rounds=2))
    assert str(file) in same.manifest["inputs"]


@pytest.mark.parametrize("engine", ["pool", "vectorized"])
def test_every_engine_begins_with_them(engine, trained):
    file = trained.path / "model.safetensors"
    serial, other = (
        # whoever trains at home begins with the initial weights
        fedloom.run("local", **DIGITS, rounds=1, init=file, engine=one).final["personal_test_accuracy"]
        for one in ("serial", engine)
    )
    assert serial == pytest.approx(other, abs=0.01)
    assert serial > fedloom.run("local", **DIGITS, rounds=1).final["personal_test_accuracy"]


def test_buffers_are_read_and_what_is_not_named_stays(tmp_path):
    settings = {**DIGITS, "model": "resnet8", "rounds": 1, "cohort": 1, "batch": 500}
    first = fedloom.run("fedavg", **settings)
    save_file(tensors(first), tmp_path / "w.safetensors")
    again = fedloom.run("fedavg", **settings, init=tmp_path / "w.safetensors", lr=1e-30, buffers="ignore")
    assert bits(again) == bits(first)


def altered(kind):
    def alter(found):
        name = next(iter(found))
        if kind == "shape":
            found[name] = found[name][:-1].clone()
        elif kind == "lacking":
            del found[name]
        else:
            found["fc.weight"] = torch.zeros(3)
        return found

    return alter


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("shape", r"body\.fc1\.bias is \[63\] there, \[64\] here"),
        ("lacking", r"they lack body\.fc1\.bias"),
        ("strange", r"the network has no fc\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_told_by_name(kind, told, trained, tmp_path):
    save_file(altered(kind)(tensors(trained)), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", **DIGITS, init=tmp_path / "w.safetensors")


class Trap:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_no_weights_are_told(tmp_path, capsys):
    torch.save({"weight": Trap()}, tmp_path / "trap.pt")  # noqa: TID251
    torch.save({"epoch": 3, "model": {}}, tmp_path / "whole.pt")  # noqa: TID251
    torch.save([torch.zeros(1)], tmp_path / "list.pt")  # noqa: TID251
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, told in {
        "trap.pt": "cannot read initial weights from .*trap.pt",
        "whole.pt": "has the entries epoch, model, which are no tensors by name; save net.state_dict",
        "list.pt": "has a list, which are no tensors by name",
        "text.safetensors": "cannot read initial weights from",
        "absent.pt": "no file of initial weights .*absent.pt",
    }.items():
        with pytest.raises(UsageError, match=told), warnings.catch_warnings():
            fedloom.run("fedavg", **DIGITS, init=tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_a_run_whose_weights_changed_is_not_resumed(trained, tmp_path):
    save_file(tensors(trained), tmp_path / "w.safetensors")
    for _ in fedloom.rounds("fedavg", **DIGITS, init=tmp_path / "w.safetensors", out=tmp_path / "run", rounds=3):
        break
    save_file({name: 2 * one for name, one in tensors(trained).items()}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"the file of initial weights .* changed since"):
        fedloom.resume(tmp_path / "run")
