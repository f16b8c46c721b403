"""Find the text, image and label columns of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset, Image, Value

from ..errors import DataError

LABELS = ("label", "labels")
INSTRUCTIONS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"))  # the names of TRL
# The text columns of GLUE and of most datasets on the Hub: one text, or two that belong together.
TEXTS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text", "text_pair"),
)


def text_column(dataset: Dataset, column: str | None, name: str) -> str:
    """The given column, else ``text``, else the only text column.

    Raises:
        DataError: there is no such column, or it contains something else; names the first such row, if there is one.
    """
    if names := instruction_columns(dataset, column):
        raise DataError(
            f"{name} has instruction data ({' and '.join(names)}) and no text column: fine-tune a causal language "
            "model on it with recipes/trl_sft.py (TRL, loss on the completions only), or name a text column with "
            "--text-column"
        )
    column = _column(dataset, column, ("text",), _is_text, "text", name)
    _check_text(dataset, column, name)
    return column


def text_columns(dataset: Dataset, column: str | None, pair: str | None, name: str) -> tuple[str, ...]:
    """The text columns of a classification dataset, one or two: the given ones, else those in ``TEXTS``, else the only
    text column beside the label.

    Raises:
        DataError: there is no such column, several choices, or a column contains something else.
    """
    for kind, given in (("text", column), ("text-pair", pair)):
        if given:
            _column(dataset, given, (), _is_text, kind, name)
    present = [names for names in TEXTS if set(names) <= set(dataset.column_names) - {pair}]
    # Question and sentence of QNLI are a pair, although a sentence alone would be one text.
    found = [names for names in present if not any(set(names) < set(others) for others in present)]
    if column:
        found = [(column,)]
    elif pair:
        found = [names for names in present if len(names) == 1]
    if not found:
        texts = [c for c, f in dataset.features.items() if _is_text(f) and c not in (*LABELS, pair)]
        found = [(text,) for text in texts]
    if len(found) != 1:
        raise DataError(
            f"{name} has no unambiguous text columns (columns: {', '.join(dataset.column_names)}); name one with "
            "--text-column, or two with --text-column and --text-pair-column"
        )
    names = (*found[0], pair) if pair else found[0]
    for text in names:
        _check_text(dataset, text, name)
    return names


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and "string" in feature.dtype


def _check_text(dataset: Dataset, column: str, name: str) -> None:
    """Raise DataError if a column contains something else than text."""
    if not _is_text(dataset.features[column]) and (len(dataset) or dataset.features[column] != Value("null")):
        found = next(((i, v) for i, v in enumerate(dataset[column], 1) if not isinstance(v, str | None)), None)
        where = f": row {found[0]} is {shortened(found[1])}" if found else ""
        if dataset.features[column] == Value("null"):
            where = ": all rows are empty"
        raise DataError(f"{name}: column {column!r} does not contain text{where}")


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
