"""Regression: a number to predict, learned in units of its deviation, and judged in its own."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import fedloom
from fedloom import tasks
from fedloom.comparison.table import table
from fedloom.data.load import load
from fedloom.errors import UsageError
from fedloom.report import comparison, exports
from fedloom.report.page import render
from fedloom.site import Site
from fedloom.tasks.regression import errors, toy

SETTINGS = {"problem": "regression", "data": "diabetes", "clients": 4, "partition": "iid"}


def diabetes(**more):
    return tasks.build(fedloom.Spec(**SETTINGS | more))


def test_the_target_is_scaled_by_training_rows_alone():
    task = diabetes(newcomers=1, public=0.1)
    f = task.federation
    source = load("diabetes", target="amount")
    amounts = torch.cat([source.train.y, source.test.y]).double()
    seen = torch.cat([f.train[k] for k in range(task.population)])
    assert task.mean == pytest.approx(amounts[seen].mean().item(), rel=1e-6)
    assert task.deviation == pytest.approx(amounts[seen].std(correction=0).item(), rel=1e-6)
    back = f.y.double() * task.deviation + task.mean
    assert torch.allclose(back, amounts, rtol=1e-5)
    assert abs(amounts.mean().item() - task.mean) > 1e-3, "other rows would move it"


def test_what_is_reported_is_in_the_units_of_the_target():
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    task = diabetes()
    data = task.global_test()
    guess = 0.3 * data.x[:, :1] - 0.2
    found = task.judge(lambda x: 0.3 * x[:, :1] - 0.2, data)
    truth, said = ((y.double() * task.deviation + task.mean).numpy() for y in (data.y, guess.squeeze(1)))
    assert found["n"] == len(data)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truth, said), rel=1e-5)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, said), rel=1e-5)
    assert found["r2"] == pytest.approx(r2_score(truth, said), rel=1e-4)
    assert found["loss"] == pytest.approx(found["rmse"] ** 2 / task.deviation**2, rel=1e-6)
    alike = fedloom.Data(torch.zeros(3, 2), torch.ones(3))
    assert "r2" not in errors(lambda x: torch.zeros(len(x), 1), alike, 1.0), "nothing varies"


def test_a_step_is_that_of_least_squares():
    task = diabetes(clients=1, model="linear", validation=0.0)
    run = fedloom.run("fedavg", task, rounds=1, lr=0.05, batch=0, epochs=1)
    data = task.data(0, "train")
    x = np.c_[data.x.double().numpy(), np.ones(len(data))]
    after = np.r_[run.model["head.weight"].double().numpy().ravel(), run.model["head.bias"].double().numpy()]
    first = Site(task, 0).initial
    before = np.r_[first["head.weight"].double().numpy().ravel(), first["head.bias"].double().numpy()]
    slope = 2 / len(x) * x.T @ (x @ before - data.y.double().numpy())
    assert after == pytest.approx(before - 0.05 * slope, abs=1e-6)


def test_it_comes_near_to_the_least_squares_of_all_rows_together():
    task = diabetes(model="linear")
    run = fedloom.run("fedavg", task, rounds=40, lr=0.02, epochs=2)
    rows = torch.cat([task.federation.train[k] for k in range(4)])
    x, y = task.federation.x[rows].double().numpy(), task.federation.y[rows].double().numpy()
    w, *_ = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)
    test = task.global_test()
    off = np.c_[test.x.double().numpy(), np.ones(len(test))] @ w - test.y.double().numpy()
    best = task.deviation * np.sqrt((off**2).mean())
    baseline = run.partition["baseline"]["rmse"]
    assert run.final["global_test_rmse"] == pytest.approx(best, rel=0.05)
    assert best < 0.8 * baseline and run.final["global_test_r2"] > 0.3
    assert run.final["personal_test_rmse"] == pytest.approx(run.final["global_test_rmse"], rel=1e-6)
    judged = [(row["validation_rmse"], row["round"]) for row in run.metrics]
    assert run.selected["round"] == min(judged)[1] and run.selected["validation_rmse"] == min(judged)[0]
    worst = max(client["rmse"] for client in run.clients["clients"])
    assert run.final["worst_client_rmse"] == worst


def test_the_baseline_is_the_mean_of_the_training_targets():
    task = diabetes()
    amounts = task.global_test().y.double() * task.deviation + task.mean
    told = task.describe()
    assert told["baseline"]["rmse"] == pytest.approx((amounts - task.mean).square().mean().sqrt().item(), rel=1e-5)
    assert told["baseline"]["mae"] == pytest.approx((amounts - task.mean).abs().mean().item(), rel=1e-5)
    assert told["target"] == {"mean": task.mean, "deviation": task.deviation}


def test_amounts_are_dealt_by_tenths_of_the_training_rows():
    source = load("diabetes", target="amount")
    y, strata = source.train.y.numpy(), source.train.strata.numpy()
    assert len(source.classes) == 10 and sorted(set(strata)) == list(range(10))
    sizes = np.bincount(strata)
    assert sizes.min() > 0.7 * sizes.max(), "each has about as many rows"
    ends = [(y[strata == k].min(), y[strata == k].max()) for k in range(10)]
    assert all(high < low for (_, high), (low, _) in pairwise(ends)), "and they do not overlap"
    for low, high, stratum in zip(source.test.y, source.test.y, source.test.strata, strict=True):
        assert stratum == 0 or low >= ends[stratum][0] - 1e-3
        assert stratum == 9 or high < ends[stratum + 1][0]
    held = np.bincount(source.test.strata.numpy(), minlength=10) / np.bincount(strata)
    assert held.min() > 0.15 and held.max() < 0.35, "the test has as much of each"


def test_heterogeneity_is_that_of_the_target():
    def spread(partition):
        f = diabetes(partition=partition, clients=8).federation
        return np.std([f.y[f.train[k]].mean().item() for k in range(8)])

    assert spread("dirichlet:0.1") > 3 * spread("iid")
    f = diabetes(partition="classes:2", clients=8).federation
    assert max(len(f.strata[f.train[k]].unique()) for k in range(8)) == 2
    told = f.table()
    assert told["classes"] == list(f.classes)
    assert [sum(c["labels"]) for c in told["clients"]] == [c["train"] for c in told["clients"]]


def test_few_rows_have_fewer_strata(tmp_path):
    file = tmp_path / "few.csv"
    file.write_text("a,target\n" + "".join(f"{k % 7}.5,{k * 1.5}\n" for k in range(12)))
    source = load(str(file), target="amount")
    assert len(source.classes) == 1 and source.train.y.dtype == torch.float32
    assert sorted(torch.cat([source.train.y, source.test.y]).tolist()) == [k * 1.5 for k in range(12)]


@pytest.mark.parametrize(
    ("text", "settings", "told"),
    [
        ("a,target\n" + "1.5,x\n2.5,y\n" * 30, {}, "the target 'target' of .* is text; regression predicts a number"),
        ("a,target\n" + "1.5,3\n2.5,3\n" * 30, {}, "is 3 in every training row"),
        ("a,target\n" + "".join(f"{k % 9}.5,{k / 3}\n" for k in range(60)) + "1.5,inf\n", {}, "infinite in 1 rows"),
        (
            "a,b,target\n" + "".join(f"{k * k % 37}.5,{k % 5}.5,{2 * (k * k % 37) + 7}\n" for k in range(60)),
            {},
            "column 'a' tells the target 'target', which lies on a line of it; exclude=a leaves it out",
        ),
        ("a,target\n" + "".join(f"{k % 9}.5,{k / 3}\n" for k in range(60)) + "1.5,\n", {}, "the label 'target' in 1"),
        (None, {"partition": "iid+flip:0.2"}, "this target has none"),
        (None, {"attack": "label_flip:0.3"}, "needs one class a sample"),
        (None, {"label": "nope"}, "no column 'nope'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path, text, settings, told):
    if text is not None:
        (tmp_path / "data.csv").write_text(text)
        settings = settings | {"data": str(tmp_path / "data.csv")}
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", rounds=1, **SETTINGS | settings)


@pytest.mark.parametrize(
    "method", ["ccvr", "fedproto", "fedgen", "feddisco", "fcp", "fedgh", "fedma", "fal", "fedimpro"]
)
def test_methods_that_work_class_by_class_refuse(method):
    with pytest.raises(UsageError, match=f"{method} needs classes, and this problem has none"):
        fedloom.run(method, toy(), rounds=1)


def test_a_plug_in_around_such_a_method_is_refused_too_and_classes_are_not():
    with pytest.raises(UsageError, match="feddisco needs classes"):
        fedloom.run("feddisco", toy(), rounds=1, inner="scaffold")
    fedloom.run("feddisco", rounds=1, clients=3)


@pytest.mark.parametrize("engine", ["pool", "vectorized", "loopback"])
def test_every_engine_predicts_numbers(engine):
    plain, other = (fedloom.run("scaffold", toy(), rounds=2, engine=name) for name in ("serial", engine))
    difference = (plain.model.flat - other.model.flat).abs().max().item()
    assert difference < 1e-6 if engine == "vectorized" else difference == 0


def test_private_training_and_resuming_go_on(tmp_path):
    private = fedloom.run("fedavg", toy(), rounds=2, dp="sample:noise=0.5,clip=1.0")
    assert np.isfinite(private.final["global_test_rmse"])
    whole = fedloom.run("fedavg", rounds=4, **SETTINGS)

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", rounds=4, out=tmp_path / "r", on_round=stop, **SETTINGS)
    again = fedloom.resume(tmp_path / "r")
    assert torch.equal(again.model.flat, whole.model.flat) and again.selected["round"] == whole.selected["round"]


def test_reports_speak_of_errors_in_their_unit(tmp_path):
    run = fedloom.run("fedavg", rounds=2, out=tmp_path / "r", **SETTINGS)
    page = render(run)
    rmse = run.selected["global_test_rmse"]
    assert f"{rmse:.4g}" in page and "test RMSE of the global model" in page and "Worst client, test RMSE" in page
    assert "ranges of the target" in page and "and their targets" in page and "classes" not in page.split("<pre")[0]
    always = run.partition["baseline"]
    told = f"RMSE {always['rmse']:.4g} and MAE {always['mae']:.4g}."
    assert f"The mean of the training targets has, on the global test, {told}" in page
    assert (
        f"{100 * rmse:.1f} %" not in page and "accuracy" not in page.replace("accuracy@", "").lower().split("<pre")[0]
    )
    done = fedloom.compare(["fedavg", "local"], out=tmp_path / "c", seeds=3, rounds=2, **SETTINGS)
    made = table(done)
    assert made.metric == "personal_test_rmse" and [q.name for q in made.qualities] == ["rmse", "mae", "r2"]
    best = min(made.rows, key=lambda one: one.score.mean)
    assert made.references == {"diabetes": best.method}
    text = exports.markdown(made, comparison.notes(done, made))
    assert "personal test RMSE | p" in text and "global test R²" in text and f"{best.score.mean:.4g} ± " in text
    assert "find above it" in text and " %" not in text.split("- Compared")[0].replace("worst client", "")
    assert "RMSE, mean and 95 % interval" in exports.latex(made)
    assert f"{made.targets['diabetes']:.4g} validation RMSE (1.053 of the reference's)" in text
    again = fedloom.compare(["fedavg"], out=tmp_path / "d", seeds=1, rounds=2, metric="global_test_r2", **SETTINGS)
    assert table(again).rows[0].score.mean == pytest.approx(again.cells[0].run.selected["global_test_r2"])


def test_the_command_line_names_the_measure(tmp_path, capsys):
    from fedloom.cli import main

    words = [f"{name}={value}" for name, value in SETTINGS.items()]
    main(["run", "fedavg", "rounds=2", "--out", str(tmp_path / "r"), *words])
    out = capsys.readouterr().out
    assert "RMSE " in out and "global test RMSE" in out and "The mean of the training targets has" in out
    main(["run", "fedavg", "rounds=2", "--out", str(tmp_path / "s"), "--json", *words])
    assert json.loads(capsys.readouterr().out)["selected"]["global_test_rmse"] > 0
