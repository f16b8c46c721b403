"""Images as samples: decoded as 8-bit RGB and processed on access."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
from datasets import Dataset, Image

from ..errors import DataError
from ..files import explain
from . import columns
from .labels import with_classes

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from ..checkpoints.load import Checkpoint

ROW = "_row"  # column of row numbers, for messages


def image_processor(checkpoint: Checkpoint) -> Any:
    """The image processor of a checkpoint.

    Raises:
        DataError: it has none.
    """
    if checkpoint.image_processor is None:
        raise DataError(f"{checkpoint.model.name_or_path} has no image processor, so images cannot be read for it")
    return checkpoint.image_processor


def images(
    dataset: Dataset,
    processor,
    image_column: str | None = None,
    label_column: str | None = None,
    name: str = "dataset",
    known: list[str] | None = None,
    *,
    labeled: bool = True,
    numbered: bool = True,
) -> Dataset:
    """``pixel_values`` (C, H, W) float32 and, if ``labeled``, ``labels`` int64, decoded and processed on access.

    Labels are renumbered as in ``known``, the classes of the model, if it contains them all. Integer labels are kept.

    Args:
        image_column, label_column: see ``columns``.
        numbered: whether the rows have the same numbers as in the dataset ``name``, for messages.
    """
    image = columns.image_column(dataset, image_column, name)
    label = columns.class_column(dataset, label_column, name) if labeled else None
    dataset = dataset.select_columns([image, *([label] if label else [])])
    try:
        dataset = dataset.cast_column(image, Image(decode=False))
    except (pyarrow.ArrowException, TypeError) as error:
        raise DataError(f"{name}: column {image!r} does not contain images: {explain(error)}") from error
    if label:
        dataset = with_classes(dataset, label, known or [], name, numbered=numbered)
    if numbered:
        dataset = dataset.add_column(ROW, range(1, len(dataset) + 1))

    def transform(batch):
        samples = {"pixel_values": processor(pictures(batch, image, name), return_tensors="pt")["pixel_values"]}
        return samples | ({"labels": batch[label]} if label else {})

    return dataset.with_transform(transform)


def pictures(batch: dict[str, list], column: str, name: str) -> list[Picture]:
    """Decode the images of a batch of the dataset returned by ``images``, before its transform."""
    rows = batch.get(ROW) or [None] * len(batch[column])
    return [picture(value, name, row) for value, row in zip(batch[column], rows, strict=True)]


def picture(value: dict[str, Any] | None, name: str, row: int | None = None) -> Picture:
    """Decode a value of an undecoded image column as 8-bit RGB.

    Raises:
        DataError: it is missing, cannot be decoded, is too large, or its pixels have no known range.
    """
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError

    file = os.path.basename((value or {}).get("path") or "")
    which = "an image" if row is None else f"the image in row {row}"
    which += f" ({file})" if file else ""
    if value is None:
        raise DataError(f"{name}: {which} is missing")
    try:
        if value.get("bytes") is None and os.path.isfile(value.get("path") or ""):
            value = {**value, "bytes": Path(value["path"]).read_bytes()}  # datasets would leave a broken file open
        return rgb(Image().decode_example(value))
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: {which} is not in a known image format") from error
    except (OSError, ValueError, AttributeError, SyntaxError, DecompressionBombError) as error:
        raise DataError(f"{name}: {which} cannot be read: {explain(error)}") from error


def rgb(image: Picture) -> Picture:
    """``image`` as 8-bit RGB. 16-bit gray values v become round(v / 257), so that 65535 becomes 255.

    Raises:
        ValueError: pixels are 32-bit integers or floats, whose range is unknown.
    """
    from PIL.Image import fromarray

    # A PGM file with more than 8 bits is read as 32-bit integers from 0 to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"its pixels are {kind}, whose range is unknown; save it with 8 or 16 bits per channel")
    return image.convert("RGB")
