"""Batches that weight the fits of a conversion, from a dataset by its name."""

from __future__ import annotations

from ..checkpoints.load import Checkpoint
from ..errors import DataError
from ..hub import DataSource
from ..tasks import data
from ..tasks.samples import batches, class_names, prepare
from .arguments import DataArguments


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
    return _batches(checkpoint, splits[split], name, samples, block_size), source


def _batches(checkpoint: Checkpoint, dataset, name: str, samples: int, block_size: int | None) -> list[dict]:
    if not checkpoint.task:
        return _of_another_task(checkpoint, dataset, name, samples, block_size)
    prepared = prepare(checkpoint, dataset, DataArguments(block_size=block_size), name)
    if checkpoint.task == "image-classification":
        found = batches(prepared, samples * 8, size=8)
        if data.class_names(prepared) != class_names(checkpoint.model):
            found = [{"pixel_values": batch["pixel_values"]} for batch in found]  # the labels are not the model's
        return found
    return _label_some(batches(prepared, samples))


def _of_another_task(checkpoint: Checkpoint, dataset, name: str, samples: int, block_size: int | None) -> list[dict]:
    """Text for an encoder or an encoder-decoder, images for an image model; without labels."""
    model = checkpoint.model
    if model.main_input_name == "pixel_values" and checkpoint.image_processor is not None:
        found = batches(data.images(dataset, checkpoint.image_processor, name=name), samples * 8, size=8)
        return [{"pixel_values": batch["pixel_values"]} for batch in found]
    if model.main_input_name != "input_ids" or checkpoint.tokenizer is None:
        raise DataError(
            f"{type(model).__name__} takes {model.main_input_name}, which --calibration-data cannot give it; "
            "calibrate it in Python with hf_ortho.convert(model, calibration=batches), or leave the flag out"
        )
    size = block_size or min(512, checkpoint.tokenizer.model_max_length)
    found = batches(data.text_chunks(dataset, checkpoint.tokenizer, size, name), samples)
    if model.config.is_encoder_decoder:
        found = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in found]
    return found


def _label_some(blocks: list[dict]) -> list[dict]:
    """Labels on a quarter of the blocks, cut into pieces: the logits of a long block outweigh a model's weights."""
    labelled = max(1, len(blocks) // 4)
    pieces = [
        {"input_ids": piece, "labels": piece}
        for block in blocks[:labelled]
        for piece in block["input_ids"].split(256, 1)
    ]
    return pieces + [{"input_ids": block["input_ids"]} for block in blocks[labelled:]]
