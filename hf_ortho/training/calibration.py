"""Calibration batches for a conversion, from a dataset given by name."""

from __future__ import annotations

from typing import Any

from ..checkpoints.load import Checkpoint
from ..hub import DataSource
from ..tasks import data, head_of
from ..tasks.arguments import DataArguments


def calibration_batches(
    checkpoint: Checkpoint, name: str, *, samples: int, split: str | None = None, **arguments: Any
) -> tuple[list[dict], DataSource]:
    """Batches of the dataset ``name``, and their source.

    Args:
        samples: number of blocks of text, or of batches of 8 images; at least 1.
        split: default: the training split.
        arguments: fields of ``DataArguments``: ``block_size`` and the columns.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the data does not fit the model.
    """
    fields = DataArguments(**arguments)
    revision = data.commit_of(name)
    splits = data.load(name, revision=revision)
    split = data.pick(splits, split, data.TRAIN, name)
    source = DataSource.of(None, name, split=split, revision=revision)
    return head_of(checkpoint.model).calibration(checkpoint, splits[split], fields, name, samples), source
