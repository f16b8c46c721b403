"""Find the text, image and label columns of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset, Image, Value

from ..errors import DataError

LABELS = ("label", "labels")
INSTRUCTIONS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"))  # the names of TRL


def text_column(dataset: Dataset, column: str | None, name: str) -> str:
    """The given column, else ``text``, else the only text column.

    Raises:
        DataError: there is no such column, or it contains something else; names the first such row, if there is one.
    """

    def is_text(feature):
        return isinstance(feature, Value) and "string" in feature.dtype

    if names := instruction_columns(dataset, column):
        raise DataError(
            f"{name} has instruction data ({' and '.join(names)}) and no text column: fine-tune on it with "
            "recipes/trl_sft.py (TRL, loss on the completions only), or name a text column with --text-column"
        )
    column = _column(dataset, column, ("text",), is_text, "text", name)
    if not is_text(dataset.features[column]) and (len(dataset) or dataset.features[column] != Value("null")):
        found = next(((i, v) for i, v in enumerate(dataset[column], 1) if not isinstance(v, str | None)), None)
        where = f": row {found[0]} is {shortened(found[1])}" if found else ""
        if dataset.features[column] == Value("null"):
            where = ": all rows are empty"
        raise DataError(f"{name}: column {column!r} does not contain text{where}")
    return column


def instruction_columns(dataset: Dataset, column: str | None) -> tuple[str, ...]:
    """``("messages",)`` or ``("prompt", "completion")`` if the dataset has them instead of text, else ().

    It has text if ``column`` names one, or if there is a column ``text``.
    """
    if column or "text" in dataset.column_names:
        return ()
    for names in INSTRUCTIONS:
        if set(names) <= set(dataset.column_names):
            if names == ("messages",) and isinstance(dataset.features["messages"], Value):
                continue  # a column of text
            return names
    return ()


def image_column(dataset: Dataset, column: str | None, name: str) -> str:
    """The given column, else ``image`` or ``img``, else the only image column."""
    return _column(dataset, column, ("image", "img"), lambda f: isinstance(f, Image), "image", name)


def class_column(dataset: Dataset, column: str | None, name: str) -> str:
    """The given column, else ``label`` or ``labels``, else the only ``ClassLabel`` column."""
    return _column(dataset, column, LABELS, lambda f: isinstance(f, ClassLabel), "label", name)


def has_labels(dataset: Dataset) -> bool:
    """Whether there may be a label column."""
    return any(name in LABELS or isinstance(feature, ClassLabel) for name, feature in dataset.features.items())


def shortened(value: Any) -> str:
    """The representation of a value, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _column(
    dataset: Dataset, requested: str | None, usual: tuple[str, ...], fits: Callable[[Any], bool], kind: str, name: str
) -> str:
    columns = ", ".join(dataset.column_names)
    if requested:
        if requested not in dataset.column_names:
            raise DataError(f"{name} has no column {requested!r}; it has: {columns}; name one with --{kind}-column")
        return requested
    matching = [c for c, f in dataset.features.items() if fits(f)]
    for candidate in (*usual, *(matching if len(matching) == 1 else ())):
        if candidate in dataset.column_names:
            return candidate
    hint = f"name it with --{kind}-column"
    nested = [c for c, f in dataset.features.items() if not isinstance(f, Value | ClassLabel | Image)]
    if kind == "text" and nested and not matching:
        hint = (
            f"{nested[0]!r} is nested: write it as text first, or rename it to messages if it has chat messages, which "
            "evaluate and --calibration-data then read, and recipes/trl_sft.py trains on"
        )
    elif kind == "label" and dataset.column_names == ["image"]:
        hint = "sort the images into one folder per class"
    raise DataError(f"{name} has no unambiguous {kind} column (columns: {columns}); {hint}")
