"""Data arguments of a recipe."""

from __future__ import annotations

import dataclasses

from ..errors import ConfigError

LEAST = {"block_size": 2, "shuffle_buffer": 1, "shuffle_blocks": 1, "max_train_samples": 1, "max_eval_samples": 1}


@dataclasses.dataclass
class DataArguments:
    """Training and evaluation data.

    Raises:
        ConfigError: a number is out of range.
    """

    _argument_group_name = "data"

    dataset: str | None = dataclasses.field(
        default=None,
        metadata={"help": "File, folder, pattern, Hub dataset, or a built-in dataset (pydoc_topics, digits)."},
    )
    eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Evaluation dataset, in the same formats. Default: a split of dataset."}
    )
    dataset_config: str | None = dataclasses.field(
        default=None, metadata={"help": "Configuration name of a Hub dataset."}
    )
    dataset_revision: str | None = dataclasses.field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    train_split: str | None = dataclasses.field(default=None, metadata={"help": "Training split. Default: train."})
    eval_split: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Evaluation split. Default: validation or test, else a tenth of the training split "
            "(with tokenize once, at most max_eval_samples)."
        },
    )
    text_column: str | None = dataclasses.field(
        default=None, metadata={"help": "Text column. Default: text, or the only text column."}
    )
    text_pair_column: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Text classification: column of the second of two texts. Default: found with the first, such as "
            "sentence1 and sentence2, or premise and hypothesis."
        },
    )
    image_column: str | None = dataclasses.field(
        default=None, metadata={"help": "Image column. Default: image, or the only image column."}
    )
    label_column: str | None = dataclasses.field(
        default=None, metadata={"help": "Label column. Default: label, or the only label column."}
    )
    block_size: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Tokens per training sample. Default: the context length of the model, at most 1024."},
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read the data during training instead of before it. Requires max_steps."}
    )
    tokenize: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "once: tokenize all text before training, into memory-mapped files that later trainings reuse and "
            "resume from at once. Default: tokenize during training with streaming, else in blocks before it."
        },
    )
    mask_probability: float = dataclasses.field(
        default=0.15, metadata={"help": "Masked LM only: probability of masking a token, or a word, above 0, below 1."}
    )
    whole_word_mask: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Masked LM only: mask all tokens of a word together, each by the mask token. Default: mask single "
            "tokens: 8 of 10 by the mask token, 1 by a random token, and 1 stays."
        },
    )
    shuffle_buffer: int = dataclasses.field(
        default=10_000,
        metadata={"help": "Streaming only: shuffle-buffer size in documents or images, per dataloader worker."},
    )
    shuffle_blocks: int = dataclasses.field(
        default=1024,
        metadata={
            "help": "Streaming text only: shuffle-buffer size in packed blocks (blocks of one document are otherwise "
            "adjacent)."
        },
    )
    max_train_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Train on the first N samples only."}
    )
    max_eval_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Evaluate on the first N samples only."}
    )
    # Set by ``hf-ortho evaluate``: the tokens from one window to the next, see ``windows``. Default: ``block_size``.
    stride: int | None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        if self.tokenize not in (None, "once"):
            raise ConfigError(f"tokenize {self.tokenize!r}: must be once, or left out")
        if self.tokenize and self.streaming:
            raise ConfigError("tokenize once: reads all text before training; leave out streaming")
        if not 0 < self.mask_probability < 1:
            raise ConfigError(f"mask_probability {self.mask_probability}: must be above 0 and below 1")
        if self.tokenize and self.whole_word_mask:
            raise ConfigError("tokenize once: stores no word boundaries; leave out whole_word_mask")
        for key, least in LEAST.items():
            value = getattr(self, key)
            if value is not None and not value >= least:
                raise ConfigError(f"{key} {value}: must be at least {least}")

    def needed_dataset(self) -> str:
        """The dataset of a training.

        Raises:
            ConfigError: there is none.
        """
        if not self.dataset:
            raise ConfigError("dataset is missing; give --dataset, or dataset in the config")
        return self.dataset
