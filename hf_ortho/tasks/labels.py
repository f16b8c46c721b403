"""The labels of a classification dataset as ``ClassLabel``."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

from datasets import ClassLabel, Dataset, Value

from ..errors import DataError
from .columns import shortened

if TYPE_CHECKING:
    from .stream import Stream

MOST = 1_000_000  # classes that are numbered: a label such as a date or an id is a mistake
NUMBERS = ("int", "uint", "float", "double", "decimal")


def with_classes(dataset: Dataset, column: str, known: list[str], name: str, *, numbered: bool = True) -> Dataset:
    """``column`` as ``ClassLabel``, renumbered as in ``known`` if it contains all classes. Integer labels are kept.

    Args:
        numbered: whether the rows have the same numbers as in the dataset ``name``, for messages.

    Raises:
        DataError: a label is missing, negative, a fraction, or not a single value.
    """
    feature, labels = dataset.features[column], list(dataset[column])
    _check(labels, _fault, column, name, numbered)
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif are_numbers(feature):
        labels = [int(label) for label in labels]
        count = max(labels, default=-1) + 1
        names = known if count == len(known) else [str(i) for i in range(count)]
    else:
        names = sorted(set(map(str, labels)))
        places = {name: i for i, name in enumerate(names)}
        labels = [places[str(label)] for label in labels]
    if set(names) <= set(known):
        places = {name: i for i, name in enumerate(known)}
        labels, names = [places[names[label]] for label in labels], known
    return dataset.remove_columns(column).add_column(column, labels, feature=ClassLabel(names=names))


def with_numbers(dataset: Dataset, column: str, name: str, *, numbered: bool = True) -> Dataset:
    """``column`` as float64: numbers to predict. The arguments are those of ``with_classes``.

    Raises:
        DataError: a label is missing or not a finite number.
    """
    labels = list(dataset[column])
    _check(labels, _fault_of_number, column, name, numbered)
    return dataset.remove_columns(column).add_column(column, list(map(float, labels)), feature=Value("float64"))


def are_numbers(feature: Any) -> bool:
    """Whether the labels are integers or floats, without names."""
    return isinstance(feature, Value) and feature.dtype.startswith(NUMBERS)


def first_fraction(dataset: Dataset, column: str) -> float | None:
    """The first label that is a number but no integer; None if there is none."""
    feature = dataset.features[column]
    if not are_numbers(feature) or feature.dtype.startswith(NUMBERS[:2]):
        return None
    values = (float(label) for label in dataset[column] if label is not None)
    return next((value for value in values if math.isfinite(value) and value % 1), None)


def _check(labels: list, fault_of: Callable[[Any], str], column: str, name: str, numbered: bool) -> None:
    for number, label in enumerate(labels, 1):
        if fault := fault_of(label):
            row = f" in row {number}" if numbered else ""
            raise DataError(f"{name}: column {column!r} contains {shortened(label)}{row}: {fault}")


def _fault_of_number(label: Any) -> str:
    """Why a value cannot be a number to predict; empty if it can."""
    fault = _missing(label)
    return fault or ("" if math.isfinite(label) else "a number to predict must be finite")


def _missing(label: Any) -> str:
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return "the label is missing"
    return "each row must have one label" if isinstance(label, list | dict) else ""


def _fault(label: Any) -> str:
    """Why a value cannot be a label; empty if it can."""
    if fault := _missing(label):
        return fault
    if not isinstance(label, Real | Decimal):
        return ""
    if label != label // 1:
        return "a label must be an integer or a name"
    if label < 0:
        return "a label must not be negative (-1 often marks rows without one)"
    return f"classes are numbered from 0, with at most {MOST:,} of them" if float(label) >= MOST else ""


def class_names(dataset: Dataset | Stream) -> list[str]:
    """The class names of prepared samples."""
    return next(f for f in (dataset.features or {}).values() if isinstance(f, ClassLabel)).names


def has_classes(dataset: Dataset | Stream) -> bool:
    """Whether the labels of prepared samples are classes, not numbers to predict."""
    return any(isinstance(feature, ClassLabel) for feature in (dataset.features or {}).values())
