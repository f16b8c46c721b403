"""Freezing policies: which parameters of a model to train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ..activations import LearnableActivation
from ..activations.base import SHARED
from ..conversion.sites import norm_layers
from ..errors import ConfigError
from ..partitioned import full_size
from .arguments import POLICIES

NO_ACTIVATIONS = "train {!r}: the model has no learnable activations; convert it first, or give --activation"
LEARNABLE = tuple(policy for policy in POLICIES if "activations" in policy)


def activation_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of learnable activations.

    Example:
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> sorted(hf_ortho.training.activation_parameters(model))[0]
        'transformer.h.0.mlp.act.coefficients'
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, LearnableActivation)
        for name, _ in module.named_parameters(recurse=False)
    }


def set_trainable(model: PreTrainedModel, policy: str, new_modules: Sequence[str] = ()) -> int:
    """Freeze all parameters except those of ``policy`` and return the number of trainable parameters.

    - ``all``: all parameters except the domains and tail slopes of activations.
    - ``activations``: the series of activations.
    - ``activations+head``: also the output head: the modules outside the base model, or the output embeddings (for a
      tied language model, also the input embeddings).
    - ``activations+norms``: also layers whose class name contains "norm" (LayerNorm, RMSNorm, BatchNorm2d, ...).
    - ``lora+activations``: also the adapters of ``add_lora``.
    - ``norms``, ``head``, ``lora``: the same without activations, as a baseline for an original model.

    The untrained ``new_modules``, such as a new head, are always trained.

    Raises:
        ConfigError: unknown policy, or the model has no learnable activations, norms, head or adapters to train.

    Example:
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> hf_ortho.training.set_trainable(model, "activations")  # 2 layers of 4 coefficients
        8
    """
    if policy not in POLICIES:
        raise ConfigError(f"train {policy!r}: must be one of {', '.join(POLICIES)}")
    names = activation_parameters(model)
    if policy != "all":
        if not names and policy in LEARNABLE:
            raise ConfigError(NO_ACTIVATIONS.format(policy))
        # peft uses copies of activations instead of the original modules.
        used = (p for n, p in model.named_parameters() if n in names and ".original_module." not in n)
        chosen = {id(p) for p in used} if policy in LEARNABLE else set()
        if policy in OTHERS:
            find, missing = OTHERS[policy]
            parameters = find(model)
            if not parameters:
                raise ConfigError(f"train {policy!r}: {type(model).__name__} has no {missing}; use 'activations'")
            chosen |= {id(p) for p in parameters}
        for path in new_modules:
            chosen |= {id(p) for p in model.get_submodule(path).parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    freeze_domains(model)
    return sum(full_size(p) for p in model.parameters() if p.requires_grad)


def freeze_domains(model: nn.Module) -> None:
    """Freeze the domains and tail slopes of all activations."""
    for module in model.modules():
        if isinstance(module, LearnableActivation):
            for name in SHARED:
                getattr(module, name).requires_grad_(False)


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    base = f"{model.base_model_prefix}."
    parameters = (
        [p for n, p in model.named_parameters() if not n.startswith(base)] if model.base_model is not model else []
    )
    output = model.get_output_embeddings()
    return parameters + (list(output.parameters()) if output is not None else [])


def _norms(model: nn.Module) -> list[nn.Parameter]:
    return [p for path in norm_layers(model) for p in model.get_submodule(path).parameters(recurse=False)]


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if ".lora_" in n]


OTHERS = {
    "activations+norms": (_norms, "norms"),
    "activations+head": (_head, "head"),
    "norms": (_norms, "norms"),
    "head": (_head, "head"),
    "lora": (_adapters, "LoRA adapters"),
    "lora+activations": (_adapters, "LoRA adapters"),
}
