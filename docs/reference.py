"""The pages that list every setting and every command, from where these are declared."""

import re
from html import escape

import typer

from fedloom.cli.commands import app
from fedloom.cli.flags import Flag, flags_of

TABLE = "| argument or option | meaning |\n| --- | --- |\n"


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
    for name, command in group.commands.items():
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
