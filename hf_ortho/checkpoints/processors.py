"""Load the tokenizer or image processor of a checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer
from transformers.utils import CONFIG_NAME, logging

from ..errors import CheckpointError
from ..files import explain, json_object
from .custom_code import refused
from .stored import stored_file

logger = logging.get_logger("hf_ortho")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def processor_of(
    auto: Any, files: tuple[str, ...], name: str, revision: str | None, trust_remote_code: bool = False
) -> Any | None:
    """The tokenizer or image processor; None if the checkpoint has none.

    An image processor that cannot be loaded is noted in the log. Errors of a tokenizer are those of transformers.

    Raises:
        CheckpointError: the processor needs a missing package, or is defined by code, which may not run.
    """
    present = {file: path for file in files if (path := stored_file(name, file, revision))}
    if not present:
        return None
    what = "the tokenizer" if auto is AutoTokenizer else "the image processor"
    try:
        return auto.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise CheckpointError(f"{what} of {name} needs a missing package: {explain(error)}") from error
    except (OSError, ValueError) as error:
        refused(error, name, revision, (*present, CONFIG_NAME), auto.__name__, what)
        if auto is AutoTokenizer:
            raise
        config = json_object(next(iter(present.values())))
        if "image_processor_type" in config:  # otherwise of another kind, such as an audio feature extractor
            logger.warning(f"note: {name} is loaded without its image processor: {explain(error)}")
        return None
