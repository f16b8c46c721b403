"""Training on the ecosystem's own engines."""

from .adapters import add_adapter, add_lora, merge_lora
from .arguments import (
    AugmentationArguments,
    DataArguments,
    LoggingArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    Recipe,
)
from .augment import AugmentedImages, MixingCollator, SoftTargetLoss
from .ema import ExponentialMovingAverage
from .evaluation import evaluate_model
from .finetune import Result, finetune
from .guard import FiniteGuard
from .metrics import Perplexity, TopKAccuracy
from .policies import POLICIES, activation_parameters, set_trainable
from .tensor_parallel import reduce_activation_gradients
from .trainer import ActivationTrainer

__all__ = [
    "POLICIES",
    "ActivationTrainer",
    "AugmentationArguments",
    "AugmentedImages",
    "DataArguments",
    "ExponentialMovingAverage",
    "FiniteGuard",
    "LoggingArguments",
    "LoraArguments",
    "MixingCollator",
    "ModelArguments",
    "OptimizerArguments",
    "Perplexity",
    "Recipe",
    "Result",
    "SoftTargetLoss",
    "TopKAccuracy",
    "activation_parameters",
    "add_adapter",
    "add_lora",
    "evaluate_model",
    "finetune",
    "merge_lora",
    "reduce_activation_gradients",
    "set_trainable",
]
