"""Calibration batches without labels, for models without a supported task."""

from __future__ import annotations

import torch
from datasets import Dataset

from ..checkpoints.load import Checkpoint
from ..checkpoints.verify import evaluating
from ..conversion.inputs import predict
from ..errors import CalibrationError, DataError
from .arguments import DataArguments
from .data import NO_TOKENIZER, check_block_size, context_length, first_chunks
from .images import image_processor, images
from .samples import batches

CANNOT = (
    "which --calibration-data cannot provide; omit it for a fit without data, or calibrate in Python with "
    "hf_ortho.convert(model, calibration=batches), where batches are outputs of the model's processor"
)
SIZE = 512  # tokens per text, unless the tokenizer or the model has a smaller limit


def unlabeled(checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int) -> list[dict]:
    """Text for an encoder or an encoder-decoder, images for an image model. See ``Head.calibration``.

    Raises:
        DataError: the model takes other inputs, or several that are needed together.
    """
    model = checkpoint.model
    make = {"input_ids": _texts, "pixel_values": image_batches}.get(model.main_input_name)
    if make is None:
        raise DataError(f"{type(model).__name__} takes {model.main_input_name}, {CANNOT}")
    modalities = getattr(model, "input_modalities", "text")
    if isinstance(modalities, str) or len(modalities) == 1:
        return make(checkpoint, rows, arguments, name, samples)
    takes = f"{type(model).__name__} takes {' and '.join(modalities)} inputs"
    try:
        inputs = make(checkpoint, rows, arguments, name, samples)
        with evaluating(model), torch.no_grad():
            predict(model, inputs[0])  # some models need all of them, others do not
    except DataError as error:
        raise DataError(f"{error} ({takes})") from error
    except CalibrationError as error:
        raise DataError(f"{takes} together, {CANNOT}") from error
    return inputs


def image_batches(
    checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
) -> list[dict]:
    """``samples`` batches of 8 images without labels."""
    prepared = images(rows, image_processor(checkpoint), arguments.image_column, name=name, labeled=False)
    return batches(prepared, samples * 8, size=8)


def _texts(checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int) -> list[dict]:
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if tokenizer is None:
        raise DataError(NO_TOKENIZER.format(model.name_or_path))
    context = min(context_length(model) or SIZE, tokenizer.model_max_length)
    size = min(SIZE, context) if arguments.block_size is None else arguments.block_size
    if context_length(model) is not None:
        check_block_size(size, context)
    texts = first_chunks(rows, tokenizer, size, samples, arguments.text_column, name)
    keys = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(keys, text) for text in texts]
