"""Exceptions raised by fedloom, each with one line that says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """The request cannot be carried out as it stands (exit code 2): nothing was started, nothing was written.

    Examples:
        >>> fedloom.run("fedagv")
        Traceback (most recent call last):
        fedloom.errors.UsageError: unknown method 'fedagv'; did you mean 'fedavg'? ...
    """


class TakenError(UsageError):
    """A folder that was to be made is there already."""


class Refused(UsageError):
    """What a method does in its run does not go with something in it, whoever the clients are.

    Where the method is tried before its run, it is told then.
    """


class RunError(RuntimeError):
    """A run that had started failed (exit code 1); what it had written stays readable.

    Examples:
        >>> fedloom.Replies([], asked=[0, 1]).mean()
        Traceback (most recent call last):
        fedloom.errors.NobodyReplied: none of the 2 clients replied to this call
        >>> from fedloom.errors import NobodyReplied
        >>> issubclass(NobodyReplied, fedloom.RunError)
        True
    """


class Untrusted(UsageError):
    """The two ends of a connection do not accept each other as they are: somebody must act before it is tried again."""


class Unreachable(RunError):
    """The other end of a connection does not answer, or broke it off: it may, when it is tried again."""


class NobodyReplied(RunError):
    """A verb that needs at least one reply got none. The run leaves the round's server values as they were."""


class CodecError(ValueError):
    """Bytes that are not a message, or a value that may not be one.

    Examples:
        >>> from fedloom import encoding
        >>> encoding.encode({"when": {1, 2}})
        Traceback (most recent call last):
        fedloom.errors.CodecError: ...
    """


def unknown(kind: str, got: object, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    return UsageError(f"unknown {kind} {got!r}{nearest(got, names)} (known: {', '.join(names)})")


def nearest(got: object, known: Iterable[str]) -> str:
    """`; did you mean 'krum'?`, where a name is near to one of those known; else nothing."""
    near = get_close_matches(str(got), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
