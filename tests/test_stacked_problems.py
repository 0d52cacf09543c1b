"""Kinds of problems that lie upon each other: few labels in a stream, a stream of texts for fine-tuning."""

import pytest
import torch
from problems import ran

import fedloom
from fedloom import tasks
from fedloom.errors import UsageError
from fedloom.methods.continual.fot import FOT
from fedloom.methods.foundation.flora import FLoRA
from fedloom.methods.labels.fedlabel import FedLabel
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.nets.adapters import LowRank
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.task import Task
from fedloom.tasks._over import Over
from fedloom.tasks.partial import Partial
from fedloom.tasks.stream import Stream, StreamToy
from fedloom.tasks.toy import Toy, toy_for


def built(problem: str, **settings: object):
    return tasks.build(Spec(**({"problem": problem, "clients": 4, "partition": "iid", "rounds": 10} | settings)))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_what_comes_with_every_task_has_labels(share):
    stream = built("stream:5,rounds=2")
    task = built(f"partial:{share}+stream:5,rounds=2")
    assert task.offers == {"partial", "stream", "stream:by=classes"}
    for round in (1, 3, 9):
        for k in range(4):
            whole = stream.at(round).data(k, "train")
            labelled, others = (task.at(round).data(k, split) for split in ("train", "unlabelled"))
            assert abs(len(labelled) - share * len(whole)) <= 0.5 and len(labelled) >= 1
            assert torch.equal(torch.cat([labelled.rows, others.rows]).sort().values, whole.rows)
            assert (others.y == -1).all() and torch.isin(labelled.y, whole.y.unique()).all()
            assert torch.equal(task.at(round).data(k, "test").rows, stream.at(round).data(k, "test").rows)
        assert torch.equal(task.at(round).global_test().rows, stream.at(round).global_test().rows)
    assert task.number(3) == 1 and task.ends(4) and task.stage(3) == 2 and task.at(1) is task
    told = task.describe()
    assert told["labelled"] == share and told["rounds_per_task"] == 2


def test_the_order_in_which_kinds_are_written_means_nothing():
    one, other = built("partial:0.2+stream:5,rounds=2").at(3), built("stream:5,rounds=2+partial:0.2").at(3)
    for split in ("train", "unlabelled", "test"):
        assert torch.equal(one.data(2, split).rows, other.data(2, split).rows)
    assert isinstance(one, Partial) and isinstance(other, Partial) and isinstance(other.inner, Stream)
    assert built("classification+stream:5,rounds=2").offers == built("stream:5,rounds=2").offers


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("stream:5+saddle", "stream lies upon a problem whose clients have rows with one label each.*not upon saddle"),
        ("vertical:0.1+partial:0.1", "partial lies upon .*not upon vertical; leave one of them out"),
        ("graph:sbm+stream:3", "not upon graph"),
        ("several:digits+partial:0.5", "not upon several"),
        ("stream:3+stream:2", "has stream twice; keep one"),
        ("finetune:lora+classification", "finetune and classification are both kinds of data; keep one"),
        ("stream:5+parshal:0.1", "unknown problem 'parshal'; did you mean 'partial'"),
        ("partial:3+stream:5", "a share of 3 keeps its labels"),
    ],
)
def test_what_does_not_go_together_is_refused_before_data_are_read(problem, told):
    with pytest.raises(UsageError, match=told):
        tasks.build(Spec(problem=problem, data="there/is/no/such.csv"))


def test_a_stream_lies_inside_and_not_upon_few_labels():
    with pytest.raises(UsageError, match="a stream lies upon a problem itself"):
        Stream(Partial(Toy()), 2, 2)
    with pytest.raises(UsageError, match=r"a share of 0 keeps its labels"):
        Partial(Toy(), share=0)


def test_methods_run_on_stacks_given_in_python():
    stream = Stream(Toy(), 3, 1, known=False)
    runs = {
        type(method).__name__: ran(method, Partial(stream, 0.5), 3, eval_every=1)
        for method in (FedLabel(), FedAvg(), FOT())
    }
    models = [made.server.model.flat for made in runs.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(models) for b in models[:i]), "each does what is its own"
    assert runs["FOT"].server.protected == 3
    assert [row["stage"] for row in runs["FedLabel"].record.metrics] == [1, 2, 3]
    run = fedloom.run("fedlabel", Partial(stream, 0.5), rounds=1, report=False)
    assert run.spec.clients == 4 and run.partition["labelled"] == 0.5


def test_the_toy_of_several_needs_has_all_of_them():
    both = toy_for(("partial", "stream"), sizes=(12, 9))
    assert {"partial", "stream", "public"} <= both.offers and both.population == 2
    assert isinstance(both, Partial) and isinstance(both.inner, StreamToy)
    assert toy_for(("stream:by=classes", "public")).offers >= {"stream:by=classes", "stream"}
    tuned = toy_for(("stream", "finetune"), sizes=(12, 9))
    assert {"finetune", "stream"} <= tuned.offers and isinstance(tuned.network().body[0], LowRank)


@pytest.mark.parametrize("upper", [("stream",), ("stream:by=classes",), ("stream", "partial")])
def test_fine_tuning_in_a_stream(upper):
    task = toy_for(("finetune", *upper))
    made = ran(FLoRA(), task, 4, eval_every=1)
    assert made.record.metrics[-1]["global_test_accuracy"] > 0.34
    other = ran(FLoRA(), toy_for(("finetune",)), 4)
    assert not torch.equal(made.server.model.flat, other.server.model.flat)


def test_texts_come_in_a_stream_and_a_model_is_tuned_on_them(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    words = {"weather": "rain snow sun", "music": "song drum flute", "food": "bread rice", "sport": "run kick swim"}
    draw = torch.Generator().manual_seed(0)
    lines = ["text,topic"]
    for label, some in words.items():
        for _ in range(30):
            places = torch.randint(len(some.split()), (4,), generator=draw).tolist()
            lines.append(f"{' '.join(some.split()[place] for place in places)},{label}")
    (tmp_path / "texts.csv").write_text("\n".join(lines) + "\n")
    settings = {"data": str(tmp_path / "texts.csv"), "label": "topic", "model": "gpt2:16,1", "clients": 2}
    problem = "stream:2,rounds=1,known=false+finetune:lora,rank=2"
    run = fedloom.run("fedavg", problem=problem, rounds=2, partition="iid", report=False, **settings)
    assert run.metrics[-1]["stage"] == 2 and "global_test_task2" in run.metrics[-1]
    task = tasks.build(Spec(problem=problem, rounds=2, partition="iid", **settings))
    assert task.offers == {"finetune", "stream", "stream:by=classes"}
    assert task.build("lora:3") is not None
    (tmp_path / "play.txt").write_text("to be or not to be " * 60)
    plain = settings | {"data": str(tmp_path / "play.txt"), "label": None}
    with pytest.raises(UsageError, match="deals samples by their class, of which CausalModel has not one each"):
        tasks.build(Spec(problem=problem, rounds=2, partition="iid", **plain))


def test_the_loss_of_few_labels_in_a_stream_is_that_of_the_stream():
    task, stream = built("partial:0.5+stream:5,rounds=2").at(3), built("stream:5,rounds=2").at(3)
    net, batch = Site(task, seed=0).bench.net, task.data(0, "train").all()
    found = task.loss(net, batch)
    whole = torch.nn.functional.cross_entropy(net(batch.x), batch.y)
    assert torch.equal(found, stream.loss(net, batch))
    assert found.item() < whole.item() - 0.5, "two classes, not ten"


def test_a_kind_that_lies_upon_another_has_all_that_a_task_has_from_it():
    """What stood in `Task` alone would hide the inner problem's own: its encoder, its shared data."""
    own = {name for name in vars(Task) if not name.startswith("_")}
    assert own - vars(Over).keys() == {"loss_above", "rows_of", "has_oracle"}, "made of `criterion`, `data` and `pool`"


@pytest.mark.parametrize("problem", ["stream:2,rounds=1", "partial:0.5", "partial:0.5+stream:2,rounds=1"])
def test_public_and_shared_data_are_there_in_every_stack(problem):
    plain = built("classification", public=0.1, shared_data=0.1)
    task = built(problem, public=0.1, shared_data=0.1)
    assert {"public", "shared_data"} <= task.offers
    assert torch.equal(task.public().rows, plain.public().rows)
    assert torch.equal(task.shared_data().x, plain.shared_data().x) and (task.shared_data().y == -1).all()
