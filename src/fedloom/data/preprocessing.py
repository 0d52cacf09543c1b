"""What was learned of the training rows to make inputs of raw ones, as plain JSON: it goes along with a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedloom.data.files import PLAIN, Files, Windows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Feature:
    """A column that is read.

    `role` is number, category, date, text or image, `width` how many numbers of the inputs it becomes, `values` the
    categories, or the words of a text beside other columns, in their order, and `fill` [width] what a gap becomes
    (none: a gap is refused). Of a column that is `kept`, every string is a value, also one that else marks a gap.
    Strings of dates are `written` in one of the ways of `dates.WRITTEN` (none: as 2024-01-31).
    """

    name: str
    role: str
    width: int = 1
    values: tuple[str, ...] = ()
    fill: tuple[float, ...] = ()
    kept: bool = False
    written: str = ""


@dataclass(frozen=True)
class Preprocessing:
    """How raw rows become inputs [N, *shape].

    `kind` is tabular, image or text. Inputs less `mean` are divided by `deviation`, one a column of x or a channel of
    an image. `eight_bit`: pixels are first divided by 255. `tokens` says what makes tokens of a text: words,
    characters, tokenizer:MODEL or spelled:MODEL (the last tokens of a text that goes on); of words and characters
    `vocabulary` has the texts, by their tokens. An `encoder`, as
    `Features.stored` has it, makes features of the inputs. `missing` is the policy by which gaps were met, and
    `files` how files were read. Columns of the `sequence` say where in which series of windows a row is: their role is
    series, number or date.
    """

    kind: str
    columns: tuple[Feature, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    missing: str = "refuse"
    eight_bit: bool = False
    tokens: str = ""
    vocabulary: tuple[str, ...] = ()
    encoder: Mapping[str, Any] | None = None
    files: Files = PLAIN
    sequence: tuple[Feature, ...] = ()

    def stored(self) -> dict[str, Any]:
        """All of it as JSON has it: `Preprocessing.restored` takes it up again."""
        return dataclasses.asdict(self)

    def scaled(self, mean: Tensor, deviation: Tensor) -> Preprocessing:
        """The same with the numbers by which inputs are scaled."""
        return replace(self, mean=tuple(mean.flatten().tolist()), deviation=tuple(deviation.flatten().tolist()))

    @staticmethod
    def restored(stored: Mapping[str, Any]) -> Preprocessing:
        """What `stored` gave, from JSON."""
        columns, sequence = (
            tuple(Feature(**_tuples(column)) for column in stored.get(name, ())) for name in ("columns", "sequence")
        )
        files = Files(**_tuples(stored["files"])) if "files" in stored else PLAIN
        if isinstance(files.windows, Mapping):
            files = replace(files, windows=Windows(**files.windows))
        return Preprocessing(**_tuples(stored) | {"columns": columns, "files": files, "sequence": sequence})


def _tuples(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
