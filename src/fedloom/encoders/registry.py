"""Encoders by name; installed packages may add some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.encoders.encoder import Encoder
from fedloom.errors import UsageError
from fedloom.members import Registry
from fedloom.parsing import Term, bound

if TYPE_CHECKING:
    from fedloom.data.source import Source

ENCODERS = Registry[type[Encoder]](
    "encoder",
    "fedloom.encoders",
    {
        "random": "fedloom.encoders.random:Random",
        "efficientnet": "fedloom.encoders.efficientnet:EfficientNet",
        "sentence": "fedloom.encoders.sentence:Sentence",
    },
    Encoder,
)


def build(setting: str) -> Encoder:
    """The encoder that a setting names: `random:64`, `efficientnet:size=128`, `sentence:FOLDER`."""
    term = Term(setting)
    cls = ENCODERS[term.name]
    return cls(**bound(term, cls))


def require_suited(setting: str, source: Source) -> None:
    """Raises UsageError for data that the encoder of a setting does not read."""
    kind, what = build(setting).kind, {"image": "images", "text": "texts", "tabular": "a table", "windows": "windows"}
    if source.kind != kind:
        others = ", ".join(name for name in ENCODERS.own if ENCODERS[name].kind == source.kind)
        instead = f"take {others}" if others else "leave it out"
        raise UsageError(
            f"embed={setting}: this encoder reads {what[kind]}, and {source.name} is {what[source.kind]}; {instead}"
        )
    if source.kind == "text" and source.vocabulary[len(source.vocabulary) - len(source.classes) :] == source.classes:
        raise UsageError(
            f"embed={setting}: {source.name} is plain text, of which every character is predicted from those before "
            "it; an encoder makes one row of features of a whole text: leave it out, or give texts with labels"
        )
