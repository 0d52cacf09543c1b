"""What README and the pages of `docs/` tell their readers to type: fenced blocks, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("sh", "bash", "shell", "console")
PYTHON = ("python", "{.python}")
SHOWN = ("text", "toml", "yaml")  # is looked at, and not typed
TYPED = re.compile(r"^\s*\$? ?(\S*/)?(fedloom|python3?|pip3?|make|git|tensorboard) ")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    language: str
    text: str
    title: str = ""  # of a file that is shown

    @property
    def first(self) -> str:
        """Its first line, which names it."""
        return self.text.strip("\n").partition("\n")[0]

    @property
    def commands(self) -> list[str]:
        """The commands of a shell's block, a line each, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = (shlex.split(line, comments=True) for line in lines)
        return [shlex.join(one).replace("'&&'", "&&") for one in words if one]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in their order; included files are read."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^( *)```([^\n]*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    made = []
    for _, told, inside in found:
        language, _, more = told.strip().partition(" ")
        named = re.fullmatch(r'title="(.+)"', more)
        made.append(Block(page.name, language if named else told.strip(), _included(inside), named[1] if named else ""))
    return made


def _included(text: str) -> str:
    whole = re.fullmatch(r'--8<-- "([\w./]+)"\n', text)
    return (ROOT / whole[1]).read_text(encoding="utf-8") if whole else text
