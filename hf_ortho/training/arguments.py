"""The fields of a recipe beside those of ``TrainingArguments``."""

from __future__ import annotations

import dataclasses

from transformers import TrainingArguments

from .trainer import POLICIES


@dataclasses.dataclass
class ModelArguments:
    """The model and its activation."""

    model: str | None = dataclasses.field(default=None, metadata={"help": "A folder or a model on the Hub."})
    model_revision: str | None = dataclasses.field(default=None, metadata={"help": "Branch, tag or commit."})
    dtype: str = dataclasses.field(
        default="float32", metadata={"help": "Of the weights: auto, float32, bfloat16, float16."}
    )
    activation: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Convert to this first, such as hermite_8, unless the model has it already."},
    )
    calibration_samples: int = dataclasses.field(
        default=8, metadata={"help": "Training samples that weight the fit of a conversion; 0 for the data-free fit."}
    )
    train: str = dataclasses.field(default="all", metadata={"help": f"What to train: {', '.join(POLICIES)}."})
    fuse_mlp: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Recompute the activations in the backward instead of keeping their outputs for the next linear "
            "layer: the same weights with less memory, for one more forward of each activation."
        },
    )


@dataclasses.dataclass
class DataArguments:
    """The data."""

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
    max_train_samples: int | None = dataclasses.field(default=None, metadata={"help": "Use the first N samples."})
    max_eval_samples: int | None = dataclasses.field(default=None, metadata={"help": "Use the first N samples."})


@dataclasses.dataclass
class Recipe:
    """All that one training needs; the fields of its groups are the keys of a YAML recipe and the flags."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
