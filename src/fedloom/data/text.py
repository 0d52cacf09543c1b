"""Words and characters as tokens: 0 is padding, 1 is unknown, the vocabulary comes from the training rows."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch

from fedloom.data.holdout import HELD_OUT, refuse_share
from fedloom.data.preprocessing import Feature, Preprocessing
from fedloom.data.source import Source, Table
from fedloom.errors import UsageError

# Training and test texts as tokens int64 [N, L] each, and the vocabulary.
Encode = Callable[[list[str], list[str]], tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]

PADDING, UNKNOWN = "<pad>", "<unk>"
MOST_WORDS = 10_000  # the most frequent ones
BESIDE = 256  # ... of a text beside other columns
LONGEST = 128  # words of a row; what follows is cut
WINDOW = 80  # characters that are seen before the one to predict, as in LEAF's Shakespeare
STRIDE = 10  # characters from one window to the next; LEAF has a window for each: ten times the rows, hardly more told


@dataclass(frozen=True)
class Reading:
    """How plain text becomes rows: windows of `window` tokens, one every `stride`.

    The tokens are characters, or what `spell` makes of a text: places in a tokenizer's `vocabulary`.
    """

    window: int = WINDOW
    stride: int = STRIDE
    spell: Callable[[str], list[int]] | None = None
    vocabulary: tuple[str, ...] = ()


CHARACTERS = Reading()

# Letters of the scripts that are written without blanks between words: Thai and Lao, Burmese, Khmer, kana, Chinese.
BLANKLESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{BLANKLESS}]|[^\W{BLANKLESS}]+|[^\w\s]")


def words(
    train: list[str], test: list[str], longest: int = LONGEST
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Both splits as lower-case words, int64 `[N, L]` (L: the longest training row, at most `longest`); the vocabulary.

    In scripts without blanks every letter is a word. A text without a word is one unknown word, so that no row is
    padding only.
    """
    rows, test_rows = map(words_of, (train, test))
    counts = Counter(word for row in rows for word in row if word != UNKNOWN)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:MOST_WORDS]
    vocabulary = (PADDING, UNKNOWN, *frequent)
    length = min(longest, max(map(len, rows)))
    return tokens(rows, vocabulary, length), tokens(test_rows, vocabulary, length), vocabulary


def frequent_words(texts: Sequence[str | None]) -> tuple[str, ...]:
    """The words, at most `BESIDE`, that most texts have of those which several have and some have not, sorted."""
    rows = [{*row} - {UNKNOWN} for row in words_of(text for text in texts if text)]
    counts = Counter(word for row in rows for word in row if word[0].isalnum())
    telling = [word for word, count in counts.items() if 1 < count < len(texts)]
    return tuple(sorted(sorted(telling, key=lambda word: (-counts[word], word))[:BESIDE]))


def having(texts: Sequence[str | None], known: Sequence[str]) -> np.ndarray:
    """Which of some words each text has, as 0 or 1, float32 `[N, W]`; NaN where there is no text."""
    place = {word: number for number, word in enumerate(known)}
    values = np.zeros((len(texts), len(known)), dtype=np.float32)
    for line, text, row in zip(values, texts, words_of(text or "" for text in texts), strict=True):
        line[[place[word] for word in row if word in place]] = 1
        if text is None:
            line[:] = np.nan
    return values


def words_of(texts: Iterable[str]) -> list[list[str]]:
    """The words of each text."""
    return [_WORD.findall(text.lower()) or [UNKNOWN] for text in texts]


def tokens(rows: Sequence[Sequence[str]], vocabulary: Sequence[str], length: int) -> torch.Tensor:
    """Words, or characters, as int64 `[N, length]`: places in the vocabulary; what follows is cut, or padded."""
    code = {word: token for token, word in enumerate(vocabulary[2:], start=2)}
    x = np.zeros((len(rows), length), dtype=np.int64)
    for line, row in zip(x, rows, strict=True):
        line[: len(row)] = [code.get(word, 1) for word in row[:length]]
    return torch.from_numpy(x)


def characters(
    data: str,
    train: Iterable[tuple[str, str]],
    test: Iterable[tuple[str, str]] | None,
    share: float | None,
    reading: Reading = CHARACTERS,
) -> Source:
    """Next-character (or next-token) prediction on plain texts, given as (title, text) pairs.

    A row is a window of 80 characters and the label is the one that follows; a new window starts every 10 characters
    of what one speaking role says ("ROLE:" on a line of its own opens a speech; text without any is spoken by its
    title). The column `role` names the speaker. Without test texts, the last `share` of what each role says
    (None: `HELD_OUT`) is the test: no character that is to be predicted there is ever seen in training. A role too
    short for one training window is left out. Every character of the training text is a class; being rare, it need not
    occur among the test labels. Where `reading` has a tokenizer, its tokens stand for the characters and all of its
    vocabulary are classes.
    """
    window, stride = reading.window, reading.stride
    spell = (lambda text: np.array(reading.spell(text), dtype=np.int64)) if reading.spell else points
    spoken = {role: spell(text) for role, text in _speeches(train).items()}
    asked = {role: spell(text) for role, text in _speeches(test).items()} if test is not None else None
    kept = 1 if asked is not None else 1 - (share or HELD_OUT)
    cut = {role: round(len(text) * kept) for role, text in spoken.items()}
    spoken = {role: text for role, text in spoken.items() if cut[role] > window}
    if not spoken:
        raise UsageError(
            f"no role in {data} says more than {window} {'tokens' if reading.spell else 'characters'} in the training "
            "split; give a longer text"
        )
    if reading.spell:
        alphabet, shift, letters = np.arange(len(reading.vocabulary)), 0, reading.vocabulary
    else:
        alphabet, shift = np.unique(np.concatenate([text[: cut[role]] for role, text in spoken.items()])), 2
        letters = tuple(map(chr, alphabet))

    windows = partial(_windows, alphabet=alphabet, shift=shift, window=window, stride=stride)
    train_rows = [windows(text, window, cut[role]) for role, text in spoken.items()]
    if asked is None:
        first = {role: window + -(-(cut[role] - window) // stride) * stride for role in spoken}
        test_rows = [windows(text, first[role], len(text)) for role, text in spoken.items()]
    else:
        said = [asked.get(role, points("")) for role in spoken]
        test_rows = [windows(text, window, len(text)) for text in said]
    train_table, test_table = (_table(rows, list(spoken)) for rows in (train_rows, test_rows))
    if asked is not None:
        refuse_share(data, share, len(test_table.y))
    if len(test_table.y) == 0:
        raise UsageError(f"{data} leaves no text to test on; give a longer text or a larger test_share")
    marks = () if reading.spell else (PADDING, UNKNOWN)
    spelled = "spelled" if reading.spell else "characters"
    known = () if reading.spell else (*marks, *letters)
    preprocessing = Preprocessing("text", (Feature("text", "text"),), (window,), tokens=spelled, vocabulary=known)
    both = train_table, test_table
    return Source(data, "text", letters, *both, (*marks, *letters), preprocessing=preprocessing, test_share=share)


def _windows(
    text: np.ndarray, first: int, end: int, *, alphabet: np.ndarray, shift: int, window: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """The windows before the positions first, first + stride, ... < end, and the places of what stands there."""
    place = np.searchsorted(alphabet, text).clip(max=len(alphabet) - 1)
    known = alphabet[place] == text
    at = np.arange(first, end, stride)
    at = at[known[at]]
    if not len(at):
        return np.empty((0, window), dtype=np.int64), np.empty(0, dtype=np.int64)
    views = np.lib.stride_tricks.sliding_window_view(np.where(known, place + shift, 1), window)
    return views[at - window], place[at]


def continued(where: str, text: str, letters: Sequence[str], window: int) -> tuple[torch.Tensor, ...]:
    """A text in windows of known letters, one every `STRIDE`: tokens int64 [N, window], the number of the letter that
    follows each, and that of the role who says it, int64 [N] both; role by role, in the order of the text.

    Raises UsageError for one that is too short for a window.
    """
    alphabet, rows, roles = points("".join(letters)), [], []
    for speech in _speeches([(where, text)]).values():
        said = points(speech)
        rows.append(_windows(said, window, len(said), alphabet=alphabet, shift=2, window=window, stride=STRIDE))
        roles += [len(rows) - 1] * len(rows[-1][1])
    if not roles:
        raise UsageError(f"no role in {where} says more than {window} characters; give a longer text")
    x, y = (torch.from_numpy(np.concatenate(part)) for part in zip(*rows, strict=True))
    return x, y, torch.tensor(roles)


def _speeches(texts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """All that each role says, in order."""
    said: list[tuple[str, str]] = []
    for title, text in texts:
        role = title
        for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip("\n")):
            heading, _, speech = block.partition("\n")
            if heading.endswith(":") and speech:
                role, block = heading[:-1].strip(), speech
            said.append((role, block))
    said.sort(key=lambda pair: pair[0])
    return {role: "\n".join(speech for _, speech in group) for role, group in groupby(said, key=lambda pair: pair[0])}


def points(text: str) -> np.ndarray:
    """The code points of a text, uint32 [letters]."""
    return np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)


def _table(rows: list[tuple[np.ndarray, np.ndarray]], roles: list[str]) -> Table:
    x, y = (np.concatenate(part) for part in zip(*rows, strict=True))
    role = np.repeat(np.array(roles), [len(labels) for _, labels in rows])
    return Table(torch.from_numpy(x), torch.from_numpy(y), {"role": role})
