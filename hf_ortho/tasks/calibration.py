"""Batches that weight the fits of models whose labels nobody knows how to make."""

from __future__ import annotations

from datasets import Dataset

from ..checkpoints.load import Checkpoint
from ..errors import DataError
from .data import images, text_chunks
from .samples import batches


def unlabeled(
    checkpoint: Checkpoint, rows: Dataset, name: str, samples: int, block_size: int | None = None
) -> list[dict]:
    """Text for an encoder or an encoder-decoder, images for an image model; see ``Head.calibration``."""
    model = checkpoint.model
    if model.main_input_name == "pixel_values" and checkpoint.image_processor is not None:
        found = batches(images(rows, checkpoint.image_processor, name=name), samples * 8, size=8)
        return [{"pixel_values": batch["pixel_values"]} for batch in found]
    if model.main_input_name != "input_ids" or checkpoint.tokenizer is None:
        raise DataError(
            f"{type(model).__name__} takes {model.main_input_name}, which --calibration-data cannot give it; "
            "calibrate it in Python with hf_ortho.convert(model, calibration=batches), or leave the flag out"
        )
    size = block_size or min(512, checkpoint.tokenizer.model_max_length)
    found = batches(text_chunks(rows, checkpoint.tokenizer, size, name), samples)
    if model.config.is_encoder_decoder:
        found = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in found]
    return found
