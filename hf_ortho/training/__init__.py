"""Training on the ecosystem's own engines."""

from .arguments import DataArguments, ModelArguments, Recipe
from .evaluation import evaluate_model
from .finetune import Result, finetune
from .guard import FiniteGuard
from .metrics import Perplexity, TopKAccuracy
from .trainer import POLICIES, ActivationTrainer, activation_parameters, set_trainable

__all__ = [
    "POLICIES",
    "ActivationTrainer",
    "DataArguments",
    "FiniteGuard",
    "ModelArguments",
    "Perplexity",
    "Recipe",
    "Result",
    "TopKAccuracy",
    "activation_parameters",
    "evaluate_model",
    "finetune",
    "set_trainable",
]
