"""Where and how the commands leave what they made: a free folder, and JSON for programs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def vacant(words: Sequence[str]) -> Path:
    """The first free folder `runs/WORD-WORD-NUMBER`."""
    name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", word).strip("-.") for word in words)
    folders = (Path("runs") / f"{name}-{number:03}" for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def tell_json(content: Any) -> None:
    """Prints what a program asked for."""
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
