"""Freezing policies, and the Trainer with activations exempt from weight decay."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..activations import LearnableActivation
from ..errors import ConfigError
from .checkpoints import WholeCheckpoints
from .guard import FiniteLoss

POLICIES = ("all", "activations", "activations+head")


def activation_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that belong to learnable activations."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, LearnableActivation)
        for name, _ in module.named_parameters(recurse=False)
    }


def set_trainable(model: PreTrainedModel, policy: str) -> int:
    """Freeze all but what ``policy`` names and return the number of trainable parameters.

    ``all``: everything but the domains of activations. ``activations``: their series alone. ``activations+head``:
    these and the output head, which is what lies outside the base model, or the output embeddings (for a tied language
    model these are the input embeddings too).

    Raises:
        ConfigError: unknown policy, or the model has no learnable activations or no head to train.
    """
    if policy not in POLICIES:
        raise ConfigError(f"train {policy!r}: must be one of {', '.join(POLICIES)}")
    names = activation_parameters(model)
    if policy != "all":
        if not names:
            raise ConfigError(
                f"train {policy!r}: the model has no learnable activations; convert it first, or give --activation"
            )
        chosen = {id(p) for n, p in model.named_parameters() if n in names}
        if policy == "activations+head":
            chosen |= {id(p) for p in _head(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    for module in model.modules():
        if isinstance(module, LearnableActivation):
            module.domain.requires_grad_(False)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    base = f"{model.base_model_prefix}."
    parameters = (
        [p for n, p in model.named_parameters() if not n.startswith(base)] if model.base_model is not model else []
    )
    output = model.get_output_embeddings()
    parameters += list(output.parameters()) if output is not None else []
    if not parameters:
        raise ConfigError(f"train 'activations+head': {type(model).__name__} has no head; use 'activations'")
    return parameters


class ActivationTrainer(FiniteLoss, WholeCheckpoints):
    """``Trainer`` that keeps the parameters of activations out of weight decay, which would pull them to f = 0.

    It also stops rather than save what is not finite, and resumes from whole checkpoints only.
    """

    def get_decay_parameter_names(self, model):
        exempt = activation_parameters(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]
