"""Calibration batches without labels, for models without a supported task."""

from __future__ import annotations

from datasets import Dataset

from ..checkpoints.load import Checkpoint
from ..errors import DataError
from .data import NO_TOKENIZER, images, text_chunks
from .samples import batches


def unlabeled(
    checkpoint: Checkpoint, rows: Dataset, name: str, samples: int, block_size: int | None = None
) -> list[dict]:
    """Text for an encoder or an encoder-decoder, images for an image model. See ``Head.calibration``."""
    model = checkpoint.model
    if model.main_input_name == "pixel_values" and checkpoint.image_processor is not None:
        inputs = batches(images(rows, checkpoint.image_processor, name=name), samples * 8, size=8)
        return [{"pixel_values": batch["pixel_values"]} for batch in inputs]
    if model.main_input_name != "input_ids":
        raise DataError(
            f"{type(model).__name__} takes {model.main_input_name}, which --calibration-data cannot provide; "
            "calibrate it in Python with hf_ortho.convert(model, calibration=batches), or omit the flag"
        )
    if checkpoint.tokenizer is None:
        raise DataError(NO_TOKENIZER.format(model.name_or_path))
    size = block_size or min(512, checkpoint.tokenizer.model_max_length)
    inputs = batches(text_chunks(rows, checkpoint.tokenizer, size, name), samples)
    if model.config.is_encoder_decoder:
        inputs = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in inputs]
    return inputs
