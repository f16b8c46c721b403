"""The fields of a recipe beside those of ``TrainingArguments``."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

SCRATCH_RATE = 1e-2
POLICIES = ("all", "activations", "activations+norms", "activations+head", "norms", "head", "lora", "lora+activations")


@dataclasses.dataclass
class ModelArguments:
    """The model and its activation."""

    _argument_group_name = "model"

    init: str = dataclasses.field(
        default="pretrained",
        metadata={"help": "pretrained, or scratch: fresh weights from the seed, only config and processor are read."},
    )
    model: str | None = dataclasses.field(default=None, metadata={"help": "A folder or a model on the Hub."})
    model_revision: str | None = dataclasses.field(default=None, metadata={"help": "Branch, tag or commit."})
    dtype: str = dataclasses.field(
        default="float32", metadata={"help": "Of the weights: auto, float32, bfloat16, float16."}
    )
    activation: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Convert to this first, such as hermite_8, unless the model has it already; with init scratch any "
            "name in ACT2FN, such as gelu, and nothing is converted."
        },
    )
    activation_init: str = dataclasses.field(
        default="gelu",
        metadata={
            "help": "How a learnable activation starts in init scratch: paper, unit, or a name in ACT2FN that "
            "it is fitted to."
        },
    )
    model_type: str | None = dataclasses.field(
        default=None, metadata={"help": "For init scratch without model: gpt2, convnext ..., in its default config."}
    )
    config_overrides: dict | str | None = dataclasses.field(
        default=None, metadata={"help": "For init scratch: other values in the config, such as {n_layer: 4}."}
    )
    tokenizer: str | None = dataclasses.field(
        default=None,
        metadata={"help": "For init scratch: bytes, bpe (learned from the dataset), a folder or a name on the Hub."},
    )
    vocab_size: int = dataclasses.field(default=4096, metadata={"help": "Tokens of tokenizer bpe."})
    image_processor_overrides: dict | str | None = dataclasses.field(
        default=None, metadata={"help": "For init scratch: other values in the image processor, such as its size."}
    )
    calibration_samples: int = dataclasses.field(
        default=8, metadata={"help": "Training samples that weight the fit of a conversion; 0 for the data-free fit."}
    )
    train: str = dataclasses.field(default="all", metadata={"help": f"What to train: {', '.join(POLICIES)}."})
    adapter: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Save a PEFT adapter instead of a whole model; with train activations the model is not converted."
        },
    )
    fuse_mlp: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Recompute the activations in the backward instead of keeping their outputs for the next linear "
            "layer: the same weights with less memory, for one more forward of each activation."
        },
    )

    def __post_init__(self):
        self.config_overrides = _mapping("config_overrides", self.config_overrides)
        self.image_processor_overrides = _mapping("image_processor_overrides", self.image_processor_overrides)


def _mapping(key: str, value: dict | str | None) -> dict:
    """A mapping of YAML, which the command line gives as text."""
    import yaml

    try:
        found = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        found = value
    if not isinstance(found, dict | None):
        raise ConfigError(f"{key} {value!r}: must be a mapping, such as {{n_layer: 4}}")
    return found or {}


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


@dataclasses.dataclass
class CompareArguments:
    """The grid of a comparison."""

    _argument_group_name = "comparison"

    activations: list[str] = dataclasses.field(
        default_factory=lambda: ["gelu", "hermite_3", "fourier_5", "tropical_5", "tropical_rational_5"],
        metadata={"help": "Names in ACT2FN; the first is what the others are compared with."},
    )
    seeds: list[int] = dataclasses.field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Each seeds weights, order of the data and dropout."}
    )
    timing_rounds: int = dataclasses.field(
        default=20, metadata={"help": "Interleaved optimizer steps per activation to time after the runs; 0: none."}
    )


@dataclasses.dataclass
class OptimizerArguments:
    """How the activations are optimised.

    Raises:
        ConfigError: a value is out of range.
    """

    _argument_group_name = "activations: optimization"

    activation_learning_rate: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Learning rate of the activations' parameters; default: learning_rate, from scratch at least 0.01."
        },
    )
    activation_gradient_scale: float = dataclasses.field(
        default=1.0, metadata={"help": "Multiplies their gradients before each step; moves SGD, not Adam."}
    )
    activation_natural_steps: bool = dataclasses.field(
        default=False,
        metadata={"help": "Optimize each coefficient in its natural unit, sqrt(k!) for hermite_n."},
    )
    domain_penalty: float = dataclasses.field(
        default=0.0,
        metadata={"help": "Weight of the mean squared distance of pre-activations from their interval, in the loss."},
    )
    domain_penalty_interval: list[float] | None = dataclasses.field(
        default=None, metadata={"help": "lo hi; default: the domain of each activation."}
    )

    def __post_init__(self):
        from ..fitting.options import is_interval

        for key in ("activation_learning_rate", "activation_gradient_scale", "domain_penalty"):
            value = getattr(self, key)
            if value is not None and not 0.0 <= value < math.inf:
                raise ConfigError(f"{key} {value}: must be a finite number, at least 0")
        if self.domain_penalty_interval is not None and not is_interval(self.domain_penalty_interval):
            raise ConfigError(f"domain_penalty_interval {self.domain_penalty_interval}: must be two numbers lo < hi")

    @property
    def needs_own_groups(self) -> str:
        """The first field that needs separate parameter groups or steps for activations; empty if none does."""
        own = ("activation_learning_rate", "activation_gradient_scale", "activation_natural_steps")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return next((key for key in own if getattr(self, key) != defaults[key]), "")


@dataclasses.dataclass
class LoggingArguments:
    """What is recorded of the activations."""

    _argument_group_name = "activations: logging"

    log_activations: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Record them every N steps, for the logs and `hf-ortho plot --history`; default: never."},
    )

    def __post_init__(self):
        if self.log_activations is not None and self.log_activations < 1:
            raise ConfigError(f"log_activations {self.log_activations}: must be at least 1")


@dataclasses.dataclass
class AugmentationArguments:
    """Augmentation of training images, and the average of the weights; all off by default."""

    _argument_group_name = "augmentation"

    random_crop: float | None = dataclasses.field(
        default=None,
        metadata={"help": "Smallest share of the area that a random resized crop keeps; 0.08 is usual for ImageNet."},
    )
    horizontal_flip: bool = dataclasses.field(default=False, metadata={"help": "Mirror half of the images, by chance."})
    randaugment: list[float] | None = dataclasses.field(
        default=None,
        metadata={"help": "Mean magnitude of RandAugment, from 0 to 10, and its standard deviation: 9 0.5."},
    )
    random_erasing: float = dataclasses.field(
        default=0.0, metadata={"help": "Probability that a rectangle of an image is replaced by noise."}
    )
    mixup: float = dataclasses.field(
        default=0.0, metadata={"help": "alpha of mixup: the shares of two images are drawn from Beta(alpha, alpha)."}
    )
    cutmix: float = dataclasses.field(
        default=0.0,
        metadata={"help": "alpha of cutmix; with mixup too each batch gets one of them, by chance."},
    )
    ema_decay: float | None = dataclasses.field(
        default=None,
        metadata={"help": "Evaluate and save an exponential moving average of the weights, with this decay per step."},
    )


@dataclasses.dataclass
class LoraArguments:
    """For ``train: lora`` and ``lora+activations``."""

    _argument_group_name = "LoRA"

    lora_r: int = dataclasses.field(default=8, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = dataclasses.field(default=16, metadata={"help": "LoRA is scaled by lora_alpha / lora_r."})
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "Dropout before the LoRA matrices."})
    lora_target_modules: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Names of the layers that get LoRA; default: all linear layers but the head."}
    )


@dataclasses.dataclass
class Recipe:
    """All that one training needs; the fields of its groups are the keys of a YAML recipe and the flags."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments = dataclasses.field(default_factory=LoraArguments)
    optimizer: OptimizerArguments = dataclasses.field(default_factory=OptimizerArguments)
    logging: LoggingArguments = dataclasses.field(default_factory=LoggingArguments)
    augmentation: AugmentationArguments = dataclasses.field(default_factory=AugmentationArguments)

    def optimizer_arguments(self) -> OptimizerArguments:
        """``optimizer`` with the default learning rate of activations for a model from scratch.

        Their parameters are of order 1, whatever the width, and have far to go there, unlike those of a conversion.
        """
        given = self.optimizer.activation_learning_rate
        if given is not None or self.model.init != "scratch":
            return self.optimizer
        rate = max(self.training.learning_rate, SCRATCH_RATE)
        return dataclasses.replace(self.optimizer, activation_learning_rate=rate)


@dataclasses.dataclass
class Comparison(Recipe):
    """A recipe with the activations and seeds to run it with."""

    compare: CompareArguments = dataclasses.field(default_factory=CompareArguments)
