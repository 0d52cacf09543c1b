"""The pages that list every setting and every command, from where these are declared."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import typer

from fedloom.cli.commands import app
from fedloom.cli.flags import Flag, flags_of

TABLE = "| argument or option | meaning |\n| --- | --- |\n"

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
EXTRAS = {  # what each is for; those of developers are not in the table
    "hub": "data sets of the Hugging Face hub: `--data hf:NAME`",
    "dp": "[differential privacy](privacy.md): `--dp`",
    "llm": "pretrained language models: `--problem finetune:lora`, `--embed sentence`",
    "images": "a pretrained [encoder](encoders.md) of images: `--embed efficientnet`",
    "tune": "searching hyper-parameters: `--tune`, `--search`",
    "track": "[trackers](comparing.md#trackers): `--track tensorboard`, `--track mlflow`",
    "ray": "a Ray cluster: `--engine ray`",
    "net": "runs between machines, and [certificates](certificates.md): `fedloom certs`",
    "secure": "secure aggregation by masks: `--secure bonawitz`",
    "he": "secure aggregation by homomorphic encryption: `--secure ckks`",
    "onnx": "`fedloom export RUN --to onnx`",
    "graphs": "cutting graphs into communities by METIS: `--problem graph:cut=metis`",
    "zstd": "[compression](compression.md) by Zstandard before Python 3.14: `--compress zstd`",
    "notebooks": "running the notebooks in `examples/`, and tables as DataFrames",
}
DEVELOPERS = ("test", "lint", "docs", "dev")


def _leaves(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group, and those of the groups in it, by their whole names."""
    for name, command in group.commands.items():
        yield from _leaves(command, f"{above}{name} ") if hasattr(command, "commands") else [(above + name, command)]


def extras() -> Mapping[str, list[str]]:
    """The extras of the package and what each requires."""
    return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def extras_table() -> str:
    """The rows of the table of extras."""
    names = {name: [re.split(r"[^\w.\-]", one)[0] for one in needs] for name, needs in extras().items()}
    return "".join(f"| `{name}` | {EXTRAS[name]} | {', '.join(names[name])} |\n" for name in names if name in EXTRAS)


def cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    """Code that may stand in a cell of a Markdown table, where backticks would show the backslash before a bar."""
    return f"<code>{escape(text).replace('|', '&#124;')}</code>"


def settings_page() -> str:
    """Every setting of a run: name, type, default, meaning."""
    return (
        "# Settings\n\nA setting has the same name everywhere: `--eval-every 5` or `eval_every=5` on the command line, "
        "`eval_every: 5` in a spec, `eval_every=5` in Python. Fields of the method are listed on "
        "[its page](methods/index.md); on the command line they are flags too (`--lr 0.1` or `method.lr=0.1`). "
        "`null` unsets a setting whose type has `None`.\n\n"
        "| setting | type | default | meaning |\n| --- | --- | --- | --- |\n" + "".join(map(_row, flags_of(None)))
    )


def _row(flag: Flag) -> str:
    default = "" if flag.default in ("None", "()") else code(flag.default)
    return f"| {code(flag.setting)} | {code(flag.kind)} | {default} | {cell(flag.comment)} |\n"


def commands_page() -> str:
    """Every command with its arguments and options, as `--help` shows them, but for the flags of settings."""
    group = typer.main.get_command(app([]))
    page = (
        "# Command line\n\n`run`, `compare` and `sweep` also take every [setting](settings.md) and every field of the "
        "method as a flag (a comparison sets `seed` and `blind` itself), "
        "`data` those settings that concern the partition. `fedloom COMMAND --help` shows them all. "
        "Add `--debug` anywhere to see the traceback of an error. Exit codes: 0 done; 1 failed; 2 invalid request; "
        "130 and 143 stopped by SIGINT and SIGTERM.\n"
    )
    for name, command in _leaves(group):
        with command.make_context(f"fedloom {name}", [], resilient_parsing=True) as context:
            records = [(param, param.get_help_record(context)) for param in command.get_params(context)]
            usage = command.get_usage(context).partition(" ")[2]
        rows = "".join(
            f"| {code(re.sub(r' <.*>$', '', record[0]) if param.param_type_name == 'argument' else record[0])} "
            f"| {cell(record[1])} |\n"
            for param, record in records
            if record
        )
        page += f"\n## {name}\n\n```text\n{usage}\n```\n\n{command.help}\n\n{TABLE}{rows}"
    return page
