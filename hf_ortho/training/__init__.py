"""Training on the ecosystem's own engines."""

from .arguments import (
    AugmentationArguments,
    DataArguments,
    LoggingArguments,
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
from .trainer import POLICIES, ActivationTrainer, activation_parameters, set_trainable

__all__ = [
    "POLICIES",
    "ActivationTrainer",
    "AugmentationArguments",
    "AugmentedImages",
    "DataArguments",
    "ExponentialMovingAverage",
    "FiniteGuard",
    "LoggingArguments",
    "MixingCollator",
    "ModelArguments",
    "OptimizerArguments",
    "Perplexity",
    "Recipe",
    "Result",
    "SoftTargetLoss",
    "TopKAccuracy",
    "activation_parameters",
    "evaluate_model",
    "finetune",
    "set_trainable",
]
