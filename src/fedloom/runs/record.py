"""A run's folder: written so that a kill at any moment leaves it readable."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
import textwrap
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import CodecError, RunError, TakenError, UsageError
from fedloom.fields import renamed

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec
    from fedloom.vector import Vector

NO_PLACE = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,  # a link where a file of the run belongs: it is not followed
)

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on every system


class Run:
    """One experiment on disk: what was asked, what came out, and what is needed to go on.

    `metrics` is a list of one dict a round: `pandas.DataFrame(run.metrics)` is the table.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "spec.yaml").is_file():
            raise UsageError(f"{self.path} is not a run's folder: it has no spec.yaml")
        self.ends: dict[str, int] = {}  # open files, by name: opening one takes longer than adding a line
        self.loose: set[str] = set()  # files that may not have reached the disk yet
        weakref.finalize(self, _closed, self.ends)

    @staticmethod
    def create(out: str | Path | None, first: Mapping[str, str]) -> Run:
        """A new folder with its first files (name: text), there with all of them or not at all; None: temporary."""
        if out is None:
            folder = Path(tempfile.mkdtemp(prefix="fedloom-"))
            for name, text in first.items():
                (folder / name).write_text(text, encoding="utf-8")
            run = Run(folder)
            weakref.finalize(run, remove, folder, os.getpid())
            return run
        path = Path(out)
        Run.free(path)
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            aside.mkdir()
            try:
                for name, text in first.items():
                    (aside / name).write_text(text, encoding="utf-8")
                aside.rename(path)
            except BaseException as failure:
                shutil.rmtree(aside, ignore_errors=True)
                if isinstance(failure, OSError) and failure.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise _taken(path) from None  # another run was quicker
                raise
        run = Run(path)
        run.loose.update(first)
        return run

    @staticmethod
    def free(out: str | Path | None) -> None:
        """Raises UsageError if `out` is there already."""
        if out is None:
            return
        with disk(Path(out)):
            there = os.path.lexists(out) or Path(out).exists()  # which tells of a name that no file may have
        if there:
            raise _taken(out)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from going on with this run; the system forgets it with the process."""
        with hold(self.path):
            yield

    @property
    def spec(self) -> Spec:
        """Everything resolved: it alone repeats the run."""
        from fedloom.runs.spec import Spec

        return Spec.read(self.path / "spec.yaml")

    @property
    def manifest(self) -> dict[str, Any]:
        """Versions, hardware, seed, status, and the privacy statement of the verbs used."""
        return renamed(self._json("manifest.json"))

    @property
    def partition(self) -> dict[str, Any]:
        """What each client got."""
        return self._json("partition.json")

    @property
    def clients(self) -> dict[str, Any]:
        """The last evaluation, client by client."""
        return self._json("clients.json")

    @property
    def chosen_clients(self) -> dict[str, Any]:
        """The evaluation that `selected` is of, client by client; empty where no file kept it."""
        for found in (self._json("chosen.json"), self.clients):
            if found and found["round"] == self.selected["round"]:
                return found
        return {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict a round."""
        return list(self.lines("metrics.jsonl"))

    @property
    def ledger(self) -> Iterator[dict[str, Any]]:
        """The payload bytes, a line at a time: round, kind, verb, direction, function, field, bytes, clients."""
        return self.lines("ledger.jsonl")

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluated round."""
        evaluated = [row for row in self.metrics if "global_test_accuracy" in row]
        if not evaluated:
            raise UsageError(f"{self.path} has no evaluated round yet")
        return evaluated[-1]

    @property
    def selected(self) -> dict[str, Any]:
        """The evaluated round that the validation data choose (the last one if there are none): the honest result.

        Where the problem changes with time, it is chosen among the rounds that were judged on what the last one was.
        """
        return chosen(self.metrics) or self.final

    @property
    def model(self) -> Vector:
        """The trained global model, by the names of its network."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from fedloom.vector import Layout, Vector

        path = self.path / "model.safetensors"
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise damaged(path, error) from error
        layout = Layout(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()), len(tensors))
        return Vector(layout.flatten(list(tensors.values())), layout)

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The whole lines of a `.jsonl` file; the torn last line that a kill may leave is left out."""
        yield from lines_of(self.path / name, having=("round",))  # which keeps a temporary record as long as it is read

    def append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join([json.dumps(line) + "\n" for line in lines]).encode()
        with disk(self.path):
            end = self._end(self.path / name)
            while text:
                text = text[os.write(end, text) :]
        self.loose.add(name)

    def sync(self) -> None:
        """Waits until all that was written has reached the disk: before a checkpoint that relies on it."""
        with disk(self.path):
            for name in sorted(self.loose):
                with suppress(FileNotFoundError):
                    file = os.open(self.path / name, os.O_RDONLY)
                    try:
                        os.fsync(file)
                    finally:
                        os.close(file)
            _sync_folder(self.path)
        self.loose.clear()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of lines."""
        return {file.name: file.stat().st_size for file in sorted(self.path.glob("*.jsonl"))}

    def _end(self, path: Path) -> int:
        """A file, open for adding to it: anew where it was moved or removed meanwhile."""
        end = self.ends.get(path.name)
        if end is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(end), path.stat()):
                    return end
            os.close(self.ends.pop(path.name))
        self.ends[path.name] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOFOLLOW, 0o666)
        return self.ends[path.name]

    def close(self) -> None:
        """Lets go of the files that lines were added to; the next line opens them again."""
        while self.ends:
            os.close(self.ends.popitem()[1])

    def cut(self, name: str, after: int) -> None:
        """Drops the lines of rounds later than `after`, which a resumed run writes again."""
        if (self.path / name).exists():
            self.write(name, lambda file: file.writelines(self._kept(name, after)))

    def _kept(self, name: str, after: int) -> Iterator[bytes]:
        for line in self.lines(name):
            if line["round"] <= after:
                yield (json.dumps(line) + "\n").encode()

    def write(self, name: str, fill: Callable[[Any], object], durable: bool = True, private: bool = False) -> None:
        """A file as `write_aside` writes it; `private`: its folder, too, is for this user only."""
        with disk(self.path):
            target = self.path / name
            if target.parent != self.path:
                target.parent.mkdir(exist_ok=True)
                if target.parent.is_symlink():
                    raise UsageError(f"{target.parent} is a link; a run writes into its own folder only")
                if private:
                    target.parent.chmod(0o700)
            write_aside(target, fill, durable, private)
            if name in self.ends:
                os.close(self.ends.pop(name))
        if not durable:
            self.loose.add(name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.write(name, lambda file: file.write((json.dumps(content) + "\n").encode()), durable=False)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.exists():
            return {}
        with _reading(path):
            return _mapping(path, path.read_bytes())

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def comparable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose validation accuracy is one of the same thing as the last one's (`Task.stage`)."""
    judged = [row for row in rows if row.get("validation_accuracy") is not None]
    return [row for row in judged if row.get("stage") == judged[-1].get("stage")]


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that validation chooses: the first of equals."""
    return max(comparable(rows), key=lambda row: row["validation_accuracy"], default=None)


def write_aside(target: Path, fill: Callable[[Any], object], durable: bool = False, private: bool = False) -> None:
    """A file written aside and renamed: it is the old one or the new one, never a half, and no link is followed.

    `durable` also waits for the disk, so that this holds through a loss of power; `private`: nobody else may read it.
    """
    aside = target.with_name(f".{target.name}.partial")
    aside.unlink(missing_ok=True)  # what a kill left, or a link that was put there: the link goes, not what it names
    end = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o600 if private else 0o666)
    try:
        with os.fdopen(end, "wb") as file:
            fill(file)
            if durable:
                file.flush()
                os.fsync(end)
        aside.replace(target)
        if durable:
            _sync_folder(target.parent)
    finally:
        aside.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Waits until what was made or renamed in a folder has reached the disk."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def damaged(path: Path, why: object) -> RunError:
    """The error for a file of a record that cannot be what was written."""
    return RunError(f"{path} is damaged ({textwrap.shorten(str(why), 200)}); restore it from a copy, or run again")


def lines_of(path: Path, having: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects, which have whole numbers under some names; none if it is not there."""
    if not path.exists():
        return
    with _reading(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _mapping(path, line, f"line {number} ", having)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _mapping(path: Path, text: bytes, where: str = "", having: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object of a file or a line; whole numbers under the names it must have."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{where}is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise damaged(path, f"{where}is no JSON object")
    for name in having:
        if type(content.get(name)) is not int:
            raise damaged(path, f"{where}has no whole number {name!r}")
    return content


def _taken(out: str | Path) -> TakenError:
    return TakenError(f"{out} exists; choose another --out, or go on with it: fedloom resume {out}")


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Around using what a record says: a value that cannot be used as what it stands for raises RunError."""
    try:
        yield
    except (UsageError, CodecError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise RunError(
            f"the record {path} is damaged, or another version wrote it ({textwrap.shorten(said, 200)}); "
            "run again with --debug for where"
        ) from error


def _closed(ends: dict[str, int]) -> None:
    for end in ends.values():
        os.close(end)


def remove(folder: Path, owner: int) -> None:
    """Removes a temporary folder, in the process that made it."""
    if os.getpid() == owner:  # and not in a worker that was forked and holds a copy of the run
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def hold(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes out of a folder inside the block; `patience`: seconds to wait for one that is leaving."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise UsageError(f"{path} is still running in another process; stop that one first") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(folder)


@contextmanager
def disk(path: Path, command: str = "resume") -> Iterator[None]:
    """Around writing to a folder: a full disk raises RunError, a folder that may not be written UsageError.

    `command` is the one that goes on with what the folder is of.
    """
    on = f"fedloom {command} {path}"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"the disk of {path} is full; free some space, then: {on}") from error
        if error.errno == errno.EFBIG:
            raise RunError(f"a file of {path} is larger than this system allows (ulimit -f); then: {on}") from error
        if error.errno == errno.ENOENT:
            raise RunError(f"the folder {path} was removed or moved meanwhile; run again") from error
        if error.errno in NO_PLACE:
            raise UsageError(f"cannot write to {path}: {error.strerror}; choose another --out") from error
        raise
