"""Data that Python has (tables, arrays, data sets of PyTorch and of the `datasets` library) as tables of Arrow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedloom.data.columns import Read
from fedloom.data.objects import NOT_TABLES, is_table, kind_of, table_of, table_of_columns
from fedloom.data.source import listed
from fedloom.errors import UsageError
from fedloom.letters import with_article
from fedloom.runs.spec import IN_PYTHON

if TYPE_CHECKING:
    import pyarrow as pa

CLIENT = "client"  # the column that tells the clients apart where each gave its own
SPLITS = ("train", "test")
EXPECTED = (
    "expected a name (digits, hf:NAME), the path of a file or folder, a DataFrame, arrays (x, y), a torch Dataset, a "
    "datasets.Dataset, or a fedloom.Task of your own; a pair of these is (train, test), a list has one for each client"
)


class Given(str):
    """The name of data that Python has, and what they are: it may stand wherever data are named.

    `read` are their tables, `client` is the column that tells whose a row is where each client gave its own, and `told`
    is what a record says of them: rows of each split, columns, and a digest.
    """

    read: Read
    client: str | None
    told: dict[str, Any]

    @staticmethod
    def of(data: object) -> Given:
        """The data as they are now; raises UsageError, with what is expected, for what cannot be taken for data."""
        client = None
        if isinstance(data, list) or _is_by_client(data):
            named = data.items() if isinstance(data, Mapping) else enumerate(data)  # type: ignore[arg-type]
            what, read, client = f"the data of {len(data)} clients", _of_clients(dict(named)), CLIENT  # type: ignore[arg-type]
        else:
            what, read = _called(data), _of_splits(data)
        given = Given(what + IN_PYTHON)
        given.read, given.client = read, client
        splits = {name: table for name, table in zip(SPLITS, (read.train, read.test), strict=True) if table is not None}
        given.told = {
            "rows": {name: table.num_rows for name, table in splits.items()},
            "columns": {field.name: _type(field.type) for field in read.train.schema},
            "digest": _digest(splits),
        }
        return given


def require_same(here: Mapping[str, Any] | None, there: Mapping[str, Any], name: str) -> None:
    """Raises UsageError unless data given in Python are what a record says that they were."""
    if here is None or here.get("digest") != there.get("digest"):
        have = "none such" if here is None else _in_words(here)
        raise UsageError(
            f"this run's data, {name} ({_in_words(there)}), are not what is given now ({have}); give the same data "
            "again: fedloom.resume(path, data)"
        )


def _in_words(told: Mapping[str, Any]) -> str:
    rows = " and ".join(f"{count} {split} rows" for split, count in told.get("rows", {}).items())
    return f"{rows} of {len(told.get('columns', ()))} columns, digest {told.get('digest')}"


def _called(data: object) -> str:
    """What a table, or the first of several, is called."""
    if is_table(data):
        return "arrays" if isinstance(data, tuple) else with_article(kind_of(data))
    if isinstance(data, tuple) and data:
        return _called(data[0])
    if isinstance(data, Mapping) and kind_of(data) != "DatasetDict":
        return _called(data["train"]) if "train" in data else "columns"
    return with_article(kind_of(data))


def _type(kind: pa.DataType) -> str:
    """The type of a column, in words: `double`, `float[28, 28]`."""
    import pyarrow as pa

    return f"{kind.value_type}{list(kind.shape)}" if isinstance(kind, pa.FixedShapeTensorType) else str(kind)


def _is_by_client(data: object) -> bool:
    """Whether a mapping has the data of each client by its name: neither splits nor columns by theirs."""
    if not isinstance(data, Mapping) or not data or set(SPLITS) & data.keys():
        return False
    if kind_of(data) == "DatasetDict":
        return False
    return all(_is_data(one) for one in data.values())


def _is_data(data: object) -> bool:
    """Whether this is a table, or several: a pair, or a mapping of splits."""
    if isinstance(data, Mapping):
        return bool(data) and (set(SPLITS) & data.keys() != set() or all(_is_column(one) for one in data.values()))
    return is_table(data) or (isinstance(data, tuple) and len(data) == 2)


def _is_column(data: object) -> bool:
    """Whether this may be a column: an array, or a sequence of single values."""
    if kind_of(data) in ("ndarray", "Tensor", "Series"):
        return True
    return isinstance(data, Sequence) and all(isinstance(one, str | int | float | bool | None) for one in data)


def _of_clients(clients: Mapping[Any, object]) -> Read:
    """The rows of all clients, one after the other, with a column of whose they are."""
    import pyarrow as pa

    if not clients:
        raise UsageError(f"the data are given as a list; {EXPECTED}, and this one is empty")
    numbered = all(isinstance(name, int) for name in clients)
    reads = {}
    for name, data in clients.items():
        if not _is_data(data):
            raise _refusal(data, f"the data of client {name!r} are")
        reads[name] = _of_splits(data)
    lacking = [name for name, read in reads.items() if read.test is None]
    if lacking and len(lacking) < len(reads):
        raise UsageError(
            f"client {listed(lacking)} has no test rows and others have some; give all clients some, or none"
        )

    def joined(parts: Mapping[Any, pa.Table]) -> pa.Table:
        whole = []
        for name, table in parts.items():
            if CLIENT in table.column_names:
                raise UsageError(
                    f"the data of client {name!r} have a column {CLIENT!r} already; rename it, or join the tables and "
                    f"set partition=column:{CLIENT}"
                )
            owner = pa.array(
                [name if numbered else str(name)] * table.num_rows, pa.int64() if numbered else pa.string()
            )
            whole.append(table.append_column(CLIENT, owner))
        names = whole[0].column_names
        for name, table in zip(parts, whole, strict=True):
            if set(table.column_names) != set(names):
                raise UsageError(
                    f"the data of client {name!r} have the columns {listed(table.column_names)}, those of "
                    f"{next(iter(parts))!r} {listed(names)}; give all the same"
                )
        try:
            return pa.concat_tables([table.select(names) for table in whole], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            told = str(error).splitlines()[0].rstrip(".")
            raise UsageError(f"the clients' data do not fit together ({told}); give all rows the same shape") from None

    tests = {name: read.test for name, read in reads.items() if read.test is not None}
    return Read(joined({name: read.train for name, read in reads.items()}), joined(tests) if tests else None)


def _of_splits(data: object) -> Read:
    """The training and, if there is one, the test table of what is one table, a pair or a mapping."""
    if is_table(data):
        return Read(table_of(data))
    if isinstance(data, tuple) and len(data) == 2 and all(_is_data(one) for one in data):
        return _pair(data[0], data[1])
    if isinstance(data, Mapping):
        if kind_of(data) == "DatasetDict":
            return of_splits_by_name("a DatasetDict", data)
        if "train" in data:
            if strange := [str(name) for name in data if name not in SPLITS]:
                raise UsageError(
                    f"the data have the splits {listed(map(str, data))}; expected train and test (validation rows are "
                    f"a share of each client's training rows): leave {listed(strange)} out, or join it to train"
                )
            return _pair(data["train"], data["test"]) if "test" in data else Read(_table(data["train"]))
        if data and all(_is_column(column) for column in data.values()):
            return Read(table_of_columns({str(name): column for name, column in data.items()}))
    raise _refusal(data, "the data are given as")


def of_splits_by_name(data: str, splits: Mapping[Any, Any]) -> Read:
    """Of the splits of the `datasets` library those that are used: train and test, or the only one."""
    found = {str(name): dataset for name, dataset in splits.items()}
    train = found.get("train") if "train" in found or len(found) != 1 else next(iter(found.values()))
    if train is None:
        raise UsageError(f"{data} has no split named train; its splits are: {', '.join(found)}")
    tested = "train" in found and "test" in found
    return Read(table_of(train), table_of(found["test"]) if tested else None)


def _pair(train: object, test: object) -> Read:
    return Read(_table(train), _table(test))


def _table(data: object) -> pa.Table:
    """One table, of what must be no more."""
    read = _of_splits(data)
    if read.test is not None:
        raise UsageError(f"one of two splits has a test split itself ({kind_of(data)}); {EXPECTED}")
    return read.train


def _refusal(data: object, what: str) -> UsageError:
    kind = kind_of(data)
    hint = f"; {NOT_TABLES[kind]}" if kind in NOT_TABLES else ""
    return UsageError(f"{what} {with_article(kind)}; {EXPECTED}{hint}")


def _digest(splits: Mapping[str, pa.Table]) -> str:
    """What tells these tables from others: of their values, types and names, not of what else is noted beside them."""
    import pyarrow as pa

    whole = hashlib.blake2b(digest_size=16)
    for name, table in splits.items():
        bare = table.combine_chunks().replace_schema_metadata(None)
        whole.update(f"{name} {table.num_rows}".encode())
        with pa.ipc.new_stream(_Into(whole), bare.schema) as stream:
            stream.write_table(bare)
    return whole.hexdigest()


class _Into:
    """A file that is digested as it is written."""

    closed = False

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def write(self, piece: Any) -> int:
        self.whole.update(piece)
        return len(piece)

    def flush(self) -> None: ...

    def close(self) -> None: ...
