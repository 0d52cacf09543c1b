"""Letters that a terminal can show: none that steer it, and look-alikes for those that it does not know."""

import codecs
import re

LOOK_ALIKE = "fedloom.look_alike"  # the name of the codecs' error handler
PLAIN = {"±": "+/-", "–": "-", "—": "-", "…": "...", "·": ".", "•": "*", "×": "x", "→": "->", "≤": "<=", "ε": "eps"}
PLAIN |= dict(zip("▁▂▃▄▅▆▇█", ".:-=+*#@", strict=True))
# C0 and C1 controls but tab and line feed, half surrogate pairs, and what turns the direction of a line
_STEERING = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def printable(text: str) -> str:
    """Text from data, with what would steer a terminal as its escape."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def with_article(word: str) -> str:
    """`a Toy`, `an Experiment`."""
    return f"{'an' if word[:1].lower() in {*'aeiou'} else 'a'} {word}"


def _look_alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error(LOOK_ALIKE, _look_alike)
