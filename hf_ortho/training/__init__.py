"""Training on the ecosystem's own engines."""

from .arguments import DataArguments, LoraArguments, ModelArguments, Recipe
from .evaluation import evaluate_model
from .finetune import Result, finetune
from .lora import add_lora, merge_lora
from .metrics import Perplexity, TopKAccuracy
from .tensor_parallel import reduce_activation_gradients
from .trainer import POLICIES, ActivationTrainer, activation_parameters, set_trainable

__all__ = [
    "POLICIES",
    "ActivationTrainer",
    "DataArguments",
    "LoraArguments",
    "ModelArguments",
    "Perplexity",
    "Recipe",
    "Result",
    "TopKAccuracy",
    "activation_parameters",
    "add_lora",
    "evaluate_model",
    "finetune",
    "merge_lora",
    "reduce_activation_gradients",
    "set_trainable",
]
