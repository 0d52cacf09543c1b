"""The small data sets that are there without a file: those of scikit-learn."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data.arrow import table_of_arrays

if TYPE_CHECKING:
    import pyarrow as pa


def _digits() -> "pa.Table":
    rows = _digits_file()
    images, digits = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(int)
    return table_of_arrays({"image": (images / 16).astype(np.float32), "label": digits})


def _digits_file() -> np.ndarray:
    """The rows of scikit-learn's digits, float64 [1797, 65]: the pixels and the digit.

    To import scikit-learn takes several times as long as a short run, and most runs need nothing else of it.
    """
    library = find_spec("sklearn")
    for folder in (library and library.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def _breast_cancer() -> "pa.Table":
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    columns = {name.replace(" ", "_"): column for name, column in zip(bunch.feature_names, bunch.data.T, strict=True)}
    return table_of_arrays({**columns, "label": bunch.target_names[bunch.target].astype(str)})


def _diabetes() -> "pa.Table":
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    columns = dict(zip(bunch.feature_names, bunch.data.T, strict=True))
    return table_of_arrays({**columns, "target": bunch.target})


EMBEDDED: "dict[str, Callable[[], pa.Table]]" = {
    "digits": _digits,
    "breast_cancer": _breast_cancer,
    "diabetes": _diabetes,
}
