"""Calibration batches for a conversion, from a dataset given by name."""

from __future__ import annotations

from ..checkpoints.load import Checkpoint
from ..errors import DataError
from ..hub import DataSource
from ..tasks import data, head_of


def calibration_batches(
    checkpoint: Checkpoint, name: str, *, samples: int, split: str | None = None, block_size: int | None = None
) -> tuple[list[dict], DataSource]:
    """Batches of the dataset ``name``, and their source.

    Args:
        samples: number of blocks of text, or of batches of 8 images.
        split: default: the training split.
        block_size: tokens per block; default: the context length of the model, at most 1024.

    Raises:
        DataError: the data does not fit the model, or ``samples`` is less than 1.
    """
    if samples < 1:
        raise DataError(f"--calibration-samples {samples}: must be at least 1")
    revision = data.commit_of(name)
    splits = data.load(name, revision=revision)
    split = data.pick(splits, split, data.TRAIN, name)
    source = DataSource.of(None, name, split=split, revision=revision)
    return head_of(checkpoint.model).calibration(checkpoint, splits[split], name, samples, block_size), source
