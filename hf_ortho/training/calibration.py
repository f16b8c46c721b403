"""Batches that weight the fits of a conversion, from a dataset by its name."""

from __future__ import annotations

from ..checkpoints.load import Checkpoint
from ..errors import DataError
from ..hub import DataSource
from ..tasks import data, head_of


def calibration_batches(
    checkpoint: Checkpoint, name: str, *, samples: int, split: str | None = None, block_size: int | None = None
) -> tuple[list[dict], DataSource]:
    """Batches of the dataset ``name``, and where they come from.

    Args:
        samples: blocks of text, or images times 8.
        split: the training split if None.
        block_size: tokens per block; the model's context, at most 1024, if None.

    Raises:
        DataError: the data do not fit the model, or ``samples`` is less than 1.
    """
    if samples < 1:
        raise DataError(f"--calibration-samples {samples}: must be at least 1")
    revision = data.commit_of(name)
    splits = data.load(name, revision=revision)
    split = data.pick(splits, split, data.TRAIN, name)
    source = DataSource.of(None, name, split=split, revision=revision)
    return head_of(checkpoint.model).calibration(checkpoint, splits[split], name, samples, block_size), source
