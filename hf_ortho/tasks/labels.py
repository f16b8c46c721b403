"""The labels of a classification dataset as ``ClassLabel``."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Real
from typing import Any

from datasets import ClassLabel, Dataset, Value

from ..errors import DataError
from .columns import shortened


def with_classes(dataset: Dataset, column: str, known: list[str], name: str, *, numbered: bool = True) -> Dataset:
    """``column`` as ``ClassLabel``, renumbered as in ``known`` if it contains all classes. Integer labels are kept.

    Args:
        numbered: whether the rows have the same numbers as in the dataset ``name``, for messages.

    Raises:
        DataError: a label is missing, negative, a fraction, or not a single value.
    """
    feature, labels = dataset.features[column], list(dataset[column])
    for number, label in enumerate(labels, 1):
        if fault := _fault(label):
            row = f" in row {number}" if numbered else ""
            raise DataError(f"{name}: column {column!r} contains {shortened(label)}{row}: {fault}")
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float", "double", "decimal")):
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


def _fault(label: Any) -> str:
    """Why a value cannot be a label; empty if it can."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return "the label is missing"
    if isinstance(label, list | dict):
        return "each row must have one label"
    if not isinstance(label, Real | Decimal):
        return ""
    if label != label // 1:
        return "a label must be an integer or a name"
    return "a label must not be negative (-1 often marks rows without one)" if label < 0 else ""


def class_names(dataset: Dataset) -> list[str]:
    """The class names of a dataset prepared by ``images``."""
    return next(f for f in dataset.features.values() if isinstance(f, ClassLabel)).names
