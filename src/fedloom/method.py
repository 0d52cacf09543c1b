"""What a federated algorithm is: a frozen dataclass of hyper-parameters, a server box and client boxes.

The folder `fedloom/methods` is the registry; nothing here imports torch, so that listing methods is immediate.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fedloom.errors import UsageError, unknown
from fedloom.fields import FORMERLY, fitting

if TYPE_CHECKING:
    from fedloom.cohort import Cohort
    from fedloom.node import Client, Server

F = TypeVar("F", bound=Callable[..., Any])
USERS = "fedloom_user_"  # begins the module names of users' files


def client(function: F) -> F:
    """Marks a function of a method as one that runs where the data is: `(self, client, **message) -> dict | None`."""
    function.__client__ = True  # type: ignore[attr-defined]
    return function


def is_client_function(function: object) -> bool:
    """Whether it is marked `@client`."""
    return getattr(function, "__client__", False)


@dataclass(frozen=True)
class Planned:
    """A call that a method makes: the `verb` by which it asks a client function, and in calls of which `kind`."""

    kind: str  # setup, train, finish or evaluate
    verb: str
    function: str  # `local`, `inner.local`


VERBS = ("mean", "call", "stream", "submit", "exchange")
BOXES = {"setup": ("setup",), "train": ("select", "round"), "finish": ("finish",), "evaluate": ("observe",)}


@dataclass(frozen=True)
class Method:
    """A federated algorithm. Fields are hyper-parameters and nothing else: the far side rebuilds it from them.

    A subclass gives `round`; where its paper asks for it also `setup`, `select`, `finish`, `predict`, and any number
    of functions marked `@client`. Numbers must be finite and not negative unless their name is in `signed`.
    """

    global_model: ClassVar[bool] = True  # False: `server.model` is no model of its own (personal or local models only)
    compressible: ClassVar[tuple[str, ...]] = ()  # reply fields that are differences and may be compressed
    private: ClassVar[tuple[str, ...]] = ()  # reply fields a privacy mechanism may clip and noise
    # What attackers take for an update. A reply's field is one, or a model under the name it was sent by; a model that
    # came by another name says where: the message's field, or `state.NAME` for what the client remembers.
    updates: ClassVar[Mapping[str, str]] = {}
    factors: ClassVar[tuple[str, ...]] = ()  # places in a reply (`factors.*.0`) that only multiply others: left alone
    rankings: ClassVar[tuple[str, ...]] = ()  # fields of Packed orders, whose opposite is the reversed order
    signed: ClassVar[tuple[str, ...]] = ()  # fields that may be negative
    # where a search looks: (low, high, "log" or "linear"), or the choices; those of the bases hold too
    ranges: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (1e-3, 1.0, "log")}
    needs: ClassVar[tuple[str, ...]] = ()  # what the task must offer: "public" data at the server, ...
    # settings of a run that it cannot be combined with, and why; `dp=sample`: values of `dp` with this word in them
    refuses: ClassVar[Mapping[str, str]] = {}
    one_shot: ClassVar[bool] = False  # training is one round, however many the run asks for
    rough: ClassVar[bool] = False  # signs, ranks or matchings make large differences of rounding

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _declared_rightly(cls)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, where = getattr(self, field.name), f"{self.name()}.{field.name}"
            value = _nested(where, value) if hints[field.name] is Method else fitting(where, value, hints[field.name])
            object.__setattr__(self, field.name, value)
            if isinstance(value, float | int) and not isinstance(value, bool):
                low = "greater than 0" if field.name in ("lr", "epochs") else "at least 0"
                if (value < 0 and field.name not in self.signed) or (value == 0 and low.startswith("greater")):
                    raise UsageError(f"{self.name()}.{field.name} is {value}; it must be {low}")

    def __reduce_ex__(self, protocol: typing.SupportsIndex) -> Any:
        # No import finds a user's file: a process that was not forked loads it from its path, as this one did.
        module = type(self).__module__
        if module.startswith(USERS):
            return build, (sys.modules[module].__file__, self.fields())
        return super().__reduce_ex__(protocol)

    @classmethod
    def name(cls) -> str:
        """The name on the command line: that of the file."""
        return cls.__module__.rpartition(".")[2]

    def fields(self) -> dict[str, Any]:
        """The hyper-parameters as plain values: `type(method)(**method.fields()) == method`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.described() if isinstance(value, Method) else value for name, value in values.items()}

    def described(self) -> dict[str, Any]:
        """The method as a spec has it: its name, or the file that it is in, and its fields."""
        module = type(self).__module__
        name = (
            self.name() if module.startswith("fedloom.methods.") else getattr(sys.modules[module], "__file__", module)
        )
        return {"name": str(name), **self.fields()}

    def path_of(self, function: Callable[..., Any]) -> str | None:
        """Where a bound client function of this method, or of one that it wraps, is found: `local`, `inner.local`."""
        owner = getattr(function, "__self__", None)
        if owner is self:
            return function.__name__
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Method) and (path := value.path_of(function)):
                return f"{field.name}.{path}"
        return None

    @classmethod
    def client_functions(cls) -> dict[str, Callable[..., Any]]:
        """The functions marked `@client`, in the order of the class's text."""
        mine = {name: f for base in reversed(cls.__mro__) for name, f in vars(base).items()}
        return {name: f for name, f in mine.items() if inspect.isfunction(f) and is_client_function(f)}

    @property
    def nested(self) -> tuple[Method, ...]:
        """This method and, inside it, those that it wraps: the outermost first."""
        inner = (getattr(self, field.name) for field in dataclasses.fields(self))
        return (self, *(one for value in inner if isinstance(value, Method) for one in value.nested))

    @cached_property
    def plan(self) -> tuple[Planned, ...]:
        """The calls that its boxes make, and those of methods that it wraps: read from their text, before any is made.

        A call that the text does not show as `cohort.verb(self.function, ...)` is not among them.
        """
        texts, functions = _texts(type(self)), self.client_functions()
        mine = [Planned(kind, *call) for kind, boxes in BOXES.items() for call in _calls(texts, functions, boxes)]
        inner = [
            replace(call, function=f"{field.name}.{call.function}")
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Method)
            for call in value.plan
        ]
        return tuple(dict.fromkeys([*mine, *inner]))

    @classmethod
    def searched(cls) -> dict[str, tuple[Any, ...]]:
        """The ranges of this method's own fields, those of its bases included."""
        known = {field.name for field in dataclasses.fields(cls)}
        merged = {name: r for base in reversed(cls.__mro__) for name, r in vars(base).get("ranges", {}).items()}
        return {name: merged[name] for name in merged if name in known}

    def setup(self, server: Server, clients: Cohort) -> None:
        """Once, before the first round: declares server values (`server.control = ...`); `clients` is everybody."""

    def select(self, server: Server, clients: Cohort) -> Cohort | None:
        """The cohort of this round out of everybody, where the method chooses; None leaves it to the world."""
        return None

    def round(self, server: Server, cohort: Cohort) -> None:
        """One server step."""
        raise NotImplementedError(f"{type(self).__name__} has no round(server, cohort)")

    def finish(self, server: Server, clients: Cohort) -> None:
        """Once, after the last round."""

    def observe(self, server: Server, clients: Cohort) -> Any:
        """Before an evaluation: gathers what only measuring needs, charged to evaluation.

        It may return what is judged as the global model in place of `server.model`: another Vector, or a function from
        inputs [B, ...] to scores [B, C].
        """
        return None

    @client
    def predict(self, client: Client, model: Any) -> Any:
        """What is judged on the client's own test: a Vector, or a function from inputs [B, ...] to scores [B, C].

        Its parameters name server values, which are what is sent. Default: the global model.
        """
        return model

    def judged(self, server: Server) -> dict[str, Any]:
        """What `predict` is sent: the server values that its parameters name."""
        names = list(inspect.signature(self.predict).parameters)[1:]
        return {name: getattr(server, name) for name in names}

    @client
    def evaluate(self, client: Client, **message: Any) -> dict[str, Any]:
        """Judges `predict` on the client's own validation and test data; never used in training."""
        judged = self.predict(client, **message)
        return {split: client.evaluate(judged, split) for split in ("validation", "test")}


@dataclass(frozen=True)
class Entry:
    """A method's file as the registry sees it, read without importing it."""

    name: str
    folder: str
    path: Path

    @property
    def doc(self) -> str:
        """The docstring of the method's class."""
        return ast.get_docstring(self._class()) or ""

    @property
    def question(self) -> str:
        """The docstring's first line: the question that the method answers."""
        return self.doc.partition("\n")[0]

    def fields(self) -> list[tuple[str, str, str, str]]:
        """(name, type, default, comment) of every hyper-parameter; the comment gives the paper's symbol."""
        own = declared(self.path.read_text(), self._class())
        base = self._base()
        if base is None:
            return own
        mine = {field[0]: field for field in own}
        inherited = base.fields()
        return [mine.pop(field[0], field) for field in inherited] + list(mine.values())

    def _base(self) -> Entry | None:
        """The method of the library that this one derives from, if any."""
        tree = ast.parse(self.path.read_text())
        bases = [ast.unparse(base) for base in method_class_in(tree, self.path).bases]
        for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
            folder, _, name = (node.module or "").rpartition(".")
            known = folder.startswith("fedloom.methods.")
            if known and any((alias.asname or alias.name) in bases for alias in node.names):
                return entry_of(name)
        return None

    def _class(self) -> ast.ClassDef:
        return method_class_in(ast.parse(self.path.read_text()), self.path)

    def load(self) -> type[Method]:
        """The method's class, imported."""
        if self.folder:
            return _method_in(importlib.import_module(f"fedloom.methods.{self.folder}.{self.name}"))
        return _from_file(self.path)


def _texts(cls: type[Method]) -> dict[str, ast.FunctionDef]:
    """The functions of a method's class, its bases' included, as their text has them; none where there is no text."""
    found: dict[str, ast.FunctionDef] = {}
    for base in reversed([base for base in cls.__mro__ if issubclass(base, Method) and base is not Method]):
        with contextlib.suppress(OSError, TypeError):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            found |= {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
    return found


def _calls(
    texts: Mapping[str, ast.FunctionDef], functions: Container[str], boxes: Sequence[str]
) -> list[tuple[str, str]]:
    """(verb, client function) of every `x.verb(self.function, ...)` in some boxes and what these call of `self`."""
    asked: list[tuple[str, str]] = []
    left, seen = list(boxes), set[str]()
    while left:
        name = left.pop(0)
        if name in seen or name not in texts:
            continue
        seen.add(name)
        for node in ast.walk(texts[name]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                own = [a.attr for a in node.args if isinstance(a, ast.Attribute) and _is_self(a.value)]
                if node.func.attr in VERBS:
                    asked += [(node.func.attr, function) for function in own if function in functions]
                elif _is_self(node.func.value) and node.func.attr not in functions:
                    left.append(node.func.attr)
    return asked


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def declared(source: str, cls: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """(name, type, default, comment on its lines) of every field of a dataclass, read from its text."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [
        (
            node.target.id,
            ast.unparse(node.annotation),
            ast.unparse(node.value) if node.value else "",
            next((comments[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in comments), ""),
        )
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    ]


def method_class_in(tree: ast.Module, path: Path) -> ast.ClassDef:
    """The one class of a method's file that derives from Method (or from another method)."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    if len(classes) != 1:
        raise UsageError(f"{path}: a method's file has exactly one class derived from Method, found {len(classes)}")
    return classes[0]


def _nested(where: str, value: Any) -> Method:
    """A method that is a field of another: given as it is, by name, or by name and fields."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return build(value["name"], {name: field for name, field in value.items() if name != "name"})
    if not isinstance(value, Method):
        raise UsageError(f"{where} is {value!r}; it must be a method: its name, or {{name: ..., field: value, ...}}")
    return value


def _declared_rightly(cls: type[Method]) -> None:
    """Raises UsageError for a class variable that means nothing (a slip, a field without its type) or is no such value.

    Variables of one's own are annotated as ClassVar, or written in capitals.
    """
    known = inspect.get_annotations(Method)
    own = inspect.get_annotations(cls).keys() - known.keys()
    for name, value in vars(cls).items():
        spoken = callable(value) or isinstance(value, property | cached_property | classmethod | staticmethod)
        if spoken or name in own or name.startswith("_") or name.isupper():
            continue
        if name not in known:
            slip = unknown(f"class variable of {cls.__name__}", name, known)
            typed = f"{name}: {type(value).__name__} = {value!r}"
            raise UsageError(f"{slip}; a hyper-parameter has its type beside it, as in {typed}")
        kind = type(getattr(Method, name))
        if not isinstance(value, kind) or (kind is tuple and not all(isinstance(one, str) for one in value)):
            raise UsageError(f"{cls.__name__}.{name} is {value!r}; it must be a {DECLARATIONS[kind]}")


DECLARATIONS = {tuple: "tuple of names, as in ('delta',)", dict: "dict", bool: "truth value"}


def _method_in(module: types.ModuleType) -> type[Method]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UsageError(f"{module.__file__}: expected exactly one class derived from Method, found {len(found)}")
    return found[0]


def _from_file(path: Path) -> type[Method]:
    path = path.resolve()
    if not path.is_file():
        raise UsageError(f"no method file {path}")
    # The folder's digest keeps two users' files of one name apart; the last part is the method's name.
    package = f"{USERS}{hashlib.blake2b(str(path.parent).encode(), digest_size=4).hexdigest()}"
    name = f"{package}.{path.stem}"
    if package not in sys.modules:  # so that `from .neighbour import ...` works
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(path.parent)]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UsageError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == FORMERLY:
                raise UsageError(f"{path} imports {FORMERLY}, which is called fedloom now: import that") from error
            raise
    return _method_in(sys.modules[name])


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every method of the library, by name; the folder is the registry, but for files that methods share (`_x.py`)."""
    root = Path(__file__).parent / "methods"
    files = [path for path in root.glob("*/*.py") if not path.stem.startswith("_")]
    return tuple(sorted((Entry(p.stem, p.parent.name, p) for p in files), key=lambda entry: entry.name))


def entry_of(name: str) -> Entry:
    """The registry's entry of a name, or of a user's file (`my_method.py`)."""
    if name.endswith(".py"):
        return Entry(Path(name).stem, "", Path(name))
    entries = {entry.name: entry for entry in catalogue()}
    if name not in entries:
        raise unknown("method", name, entries)
    return entries[name]


def build(name: str, fields: Mapping[str, Any] | None = None) -> Method:
    """A method from its name (or file) and some of its fields; the rest take their defaults."""
    cls = entry_of(name).load()
    known = [field.name for field in dataclasses.fields(cls)]
    for field in fields or {}:
        if field not in known:
            raise unknown(f"field of {name}", field, known)
    return cls(**(fields or {}))
