"""The fields of a recipe other than ``TrainingArguments``."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..tasks import NAMES
from ..tasks.arguments import DataArguments
from .groups import parse_groups

if TYPE_CHECKING:
    from transformers import TrainingArguments

SCRATCH_RATE = 1e-2
POLICIES = ("all", "activations", "activations+norms", "activations+head", "norms", "head", "lora", "lora+activations")


@dataclasses.dataclass
class ModelArguments:
    """Model and activation."""

    _argument_group_name = "model"

    init: str = dataclasses.field(
        default="pretrained",
        metadata={
            "help": "pretrained, or scratch (random weights; only the config and processor are loaded). "
            "Default: pretrained; in hf-ortho pretrain, scratch."
        },
    )
    model: str | None = dataclasses.field(default=None, metadata={"help": "Folder or Hub model."})
    model_revision: str | None = dataclasses.field(
        default=None, metadata={"help": "Branch, tag or commit of the Hub model."}
    )
    dtype: str = dataclasses.field(
        default="float32", metadata={"help": "Data type of the weights: auto, float32, bfloat16 or float16."}
    )
    activation: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Activation to convert to before training, such as hermite_8, unless the model already has it. "
            "With init scratch, any name in ACT2FN, such as gelu (nothing is converted)."
        },
    )
    activation_init: str = dataclasses.field(
        default="gelu",
        metadata={
            "help": "With init scratch, initialization of a learnable activation: paper, unit, or a name in "
            "ACT2FN to fit it to."
        },
    )
    model_type: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "With init scratch and no model: model type, such as gpt2 or convnext, in its default config."
        },
    )
    config_overrides: dict | str | None = dataclasses.field(
        default=None, metadata={"help": "With init scratch: config values to override, such as {n_layer: 4}."}
    )
    task: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"Task: {', '.join(NAMES)}. A model with another head gets a new one. "
            "Default: the task of the head of the model; with init scratch, fill-mask for encoders such as bert, else "
            "that of the model type."
        },
    )
    tokenizer: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Tokenizer: a folder, a Hub name, bytes, or with init scratch bpe (learned from the dataset). "
            "Default: the one of the model."
        },
    )
    vocab_size: int = dataclasses.field(default=4096, metadata={"help": "Vocabulary size of tokenizer bpe."})
    image_processor_overrides: dict | str | None = dataclasses.field(
        default=None, metadata={"help": "With init scratch: image processor values to override, such as its size."}
    )
    calibration_samples: int = dataclasses.field(
        default=8, metadata={"help": "Number of training samples to calibrate a conversion with (0: data-free fit)."}
    )
    train: str = dataclasses.field(default="all", metadata={"help": f"Parameters to train: {', '.join(POLICIES)}."})
    adapter: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Save a PEFT adapter instead of the full model. With train activations, the model is not converted."
        },
    )
    fuse_mlp: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Recompute the activations in the backward pass instead of saving their outputs for the next "
            "linear layer. Gives the same weights with less memory, but one extra forward per activation."
        },
    )
    channels_last: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Store images and the weights of convolutions with the channels last in memory, which is faster on "
            "GPUs. Gives the same results up to rounding."
        },
    )

    trust_remote_code: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Run the code in the repository of a model that needs it; read it first. Otherwise such a model is "
            "refused."
        },
    )

    def __post_init__(self):
        if not self.calibration_samples >= 0:
            raise ConfigError(f"calibration_samples {self.calibration_samples}: must be at least 0")
        self.config_overrides = _mapping("config_overrides", self.config_overrides)
        self.image_processor_overrides = _mapping("image_processor_overrides", self.image_processor_overrides)


def _mapping(key: str, value: dict | str | None) -> dict:
    """A YAML mapping, given as text on the command line."""
    import yaml

    try:
        mapping = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        mapping = value
    if not isinstance(mapping, dict | None):
        raise ConfigError(f"{key} {value!r}: must be a mapping, such as {{n_layer: 4}}")
    return mapping or {}


@dataclasses.dataclass
class CompareArguments:
    """The grid of a comparison."""

    _argument_group_name = "comparison"

    activations: list[str] = dataclasses.field(
        default_factory=lambda: ["gelu", "hermite_3", "fourier_5", "tropical_5", "tropical_rational_5"],
        metadata={
            "help": "Names of activations in transformers (ACT2FN) or hf_ortho; the first is the reference. "
            "Default: gelu hermite_3 fourier_5 tropical_5 tropical_rational_5."
        },
    )
    seeds: list[int] = dataclasses.field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Seeds of the weights, data order and dropout. Default: 0 1 2."},
    )
    timing_rounds: int = dataclasses.field(
        default=20,
        metadata={"help": "Number of optimizer steps per activation to time after the runs, interleaved (0: none)."},
    )


@dataclasses.dataclass
class OptimizerArguments:
    """How the activations, and parameters selected by name, are optimized.

    Raises:
        ConfigError: a value is out of range.
    """

    _argument_group_name = "activations and parameter groups: optimization"

    activation_learning_rate: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Learning rate of activation parameters. Default: learning_rate (with init scratch, at least 0.01)."
        },
    )
    activation_gradient_scale: float = dataclasses.field(
        default=1.0,
        metadata={"help": "Factor on the gradients of activations before each step. Affects SGD but not Adam."},
    )
    activation_natural_steps: bool = dataclasses.field(
        default=False,
        metadata={"help": "Optimize each coefficient in its natural unit, such as sqrt(k!) for hermite_n."},
    )
    domain_penalty: float = dataclasses.field(
        default=0.0,
        metadata={"help": "Weight in the loss of the mean squared distance of pre-activations from their interval."},
    )
    domain_penalty_interval: list[float] | None = dataclasses.field(
        default=None,
        metadata={"help": "Interval of the domain penalty: lo hi. Default: the domain of each activation."},
    )
    param_groups: list[dict[str, Any]] | str | None = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Learning rate and weight decay by name: a YAML list of entries such as {pattern: embed, "
            "learning_rate: 1e-4, weight_decay: 0}. The first entry whose pattern, a regular expression, is found in "
            "the name of a parameter applies to it. Default: none."
        },
    )

    def __post_init__(self):
        from ..fitting.options import is_interval

        self.param_groups = parse_groups(self.param_groups)

        for key in ("activation_learning_rate", "activation_gradient_scale", "domain_penalty"):
            value = getattr(self, key)
            if value is not None and not 0.0 <= value < math.inf:
                raise ConfigError(f"{key} {value}: must be a finite number and at least 0")
        if self.domain_penalty_interval is not None and not is_interval(self.domain_penalty_interval):
            raise ConfigError(
                f"domain_penalty_interval {self.domain_penalty_interval}: must be two finite numbers lo < hi"
            )

    @property
    def needs_own_groups(self) -> str:
        """The first field that needs separate parameter groups or steps; empty if none does."""
        fields = ("activation_learning_rate", "activation_gradient_scale", "activation_natural_steps", "param_groups")
        default = OptimizerArguments()
        return next((key for key in fields if getattr(self, key) != getattr(default, key)), "")


@dataclasses.dataclass
class LoggingArguments:
    """Recording of the activations during training."""

    _argument_group_name = "activations: logging"

    log_activations: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Record the activations every N steps, for logs and `hf-ortho plot --history`. Default: never."
        },
    )

    def __post_init__(self):
        if self.log_activations is not None and self.log_activations < 1:
            raise ConfigError(f"log_activations {self.log_activations}: must be at least 1")


@dataclasses.dataclass
class AugmentationArguments:
    """Augmentation of training images and averaging of the weights. Everything is off by default."""

    _argument_group_name = "augmentation"

    random_crop: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Minimum area of a random resized crop, as a fraction of the image; ImageNet commonly uses 0.08."
        },
    )
    horizontal_flip: bool = dataclasses.field(
        default=False, metadata={"help": "Mirror each image with probability 1/2."}
    )
    randaugment: list[float] | None = dataclasses.field(
        default=None,
        metadata={"help": "Mean magnitude of RandAugment (0 to 10) and its standard deviation, such as 9 0.5."},
    )
    random_erasing: float = dataclasses.field(
        default=0.0, metadata={"help": "Probability of replacing a rectangle of an image with noise."}
    )
    mixup: float = dataclasses.field(
        default=0.0, metadata={"help": "alpha of mixup: mix images with weights from Beta(alpha, alpha)."}
    )
    cutmix: float = dataclasses.field(
        default=0.0,
        metadata={"help": "alpha of cutmix. With mixup, each batch randomly gets one of the two."},
    )
    ema_decay: float | None = dataclasses.field(
        default=None,
        metadata={"help": "Evaluate and save an exponential moving average of the weights with this decay per step."},
    )


@dataclasses.dataclass
class LoraArguments:
    """LoRA, for ``train: lora`` and ``lora+activations``."""

    _argument_group_name = "LoRA"

    lora_r: int = dataclasses.field(default=8, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = dataclasses.field(default=16, metadata={"help": "LoRA is scaled by lora_alpha / lora_r."})
    lora_dropout: float = dataclasses.field(
        default=0.0, metadata={"help": "Dropout on the input of the LoRA matrices."}
    )
    lora_target_modules: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Names of the layers to apply LoRA to. Default: all linear layers except the head."},
    )


@dataclasses.dataclass
class Recipe:
    """All settings of one training. The fields of its groups are the keys of a YAML recipe and the command-line flags.

    Example:
        >>> from transformers import TrainingArguments
        >>> from hf_ortho.training import DataArguments, ModelArguments, Recipe
        >>> model_arguments = ModelArguments(init="scratch", model_type="gpt2", activation="hermite_3")
        >>> recipe = Recipe(model_arguments, DataArguments("pydoc_topics"), TrainingArguments("out"))
        >>> recipe.optimizer_arguments().activation_learning_rate
        0.01
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments = dataclasses.field(default_factory=LoraArguments)
    optimizer: OptimizerArguments = dataclasses.field(default_factory=OptimizerArguments)
    logging: LoggingArguments = dataclasses.field(default_factory=LoggingArguments)
    augmentation: AugmentationArguments = dataclasses.field(default_factory=AugmentationArguments)

    @property
    def others(self) -> tuple[str, ...]:
        """Further activations whose parameters ``param_groups`` may name, as in a comparison."""
        return ()

    def optimizer_arguments(self) -> OptimizerArguments:
        """``optimizer``, with the default learning rate of activations for a model from scratch.

        Their parameters are of order 1 for any width and have far to move, unlike after a conversion.
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
