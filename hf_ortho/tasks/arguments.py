"""The data of a recipe."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class DataArguments:
    """The data."""

    _argument_group_name = "data"

    dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "A file, a folder, a dataset on the Hub, pydoc_topics or digits."}
    )
    eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Another such place for the evaluation; default: a split of dataset."}
    )
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = dataclasses.field(default=None, metadata={"help": "Branch, tag or commit."})
    train_split: str | None = dataclasses.field(default=None, metadata={"help": "Default: train."})
    eval_split: str | None = dataclasses.field(
        default=None, metadata={"help": "Default: validation or test, else a tenth of the training split."}
    )
    text_column: str | None = dataclasses.field(default=None, metadata={"help": "Default: text, or the only one."})
    image_column: str | None = dataclasses.field(default=None, metadata={"help": "Default: image, or the only one."})
    label_column: str | None = dataclasses.field(default=None, metadata={"help": "Default: label, or the only one."})
    block_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Tokens per training sample; default: the model's context, at most 1024."}
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read the data while training instead of before it; needs max_steps."}
    )
    shuffle_buffer: int = dataclasses.field(
        default=10_000,
        metadata={"help": "With streaming: documents or images in memory, per dataloader worker, to draw from."},
    )
    shuffle_blocks: int = dataclasses.field(
        default=1024,
        metadata={
            "help": "With streaming of text: blocks from which the next one is drawn; those of one document follow "
            "each other in the stream."
        },
    )
    max_train_samples: int | None = dataclasses.field(default=None, metadata={"help": "Use the first N samples."})
    max_eval_samples: int | None = dataclasses.field(default=None, metadata={"help": "Use the first N samples."})
