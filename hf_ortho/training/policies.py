"""Freezing policies: which parameters of a model are trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..activations import LearnableActivation
from ..errors import ConfigError
from .arguments import POLICIES

NO_ACTIVATIONS = "train {!r}: the model has no learnable activations; convert it first, or give --activation"
LEARNABLE = tuple(policy for policy in POLICIES if "activations" in policy)


def activation_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that belong to learnable activations."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, LearnableActivation)
        for name, _ in module.named_parameters(recurse=False)
    }


def set_trainable(model: PreTrainedModel, policy: str, new_head: str = "") -> int:
    """Freeze all but what ``policy`` names and return the number of trainable parameters.

    ``all``: everything but the domains of activations. ``activations``: their series alone. ``activations+head``:
    these and the output head, which is what lies outside the base model, or the output embeddings (for a tied language
    model these are the input embeddings too). ``activations+norms``: these and the layers whose class is named after a
    norm (LayerNorm, RMSNorm, BatchNorm2d, ...). ``lora+activations``: these and the adapters of ``add_lora``.
    ``norms``, ``head`` and ``lora`` leave the activations out, to compare an original model with one whose activations
    learn. The module ``new_head``, a head without training, is trained in any case.

    Raises:
        ConfigError: unknown policy, or the model has no learnable activations, norms, head or adapters to train.
    """
    if policy not in POLICIES:
        raise ConfigError(f"train {policy!r}: must be one of {', '.join(POLICIES)}")
    names = activation_parameters(model)
    if policy != "all":
        if not names and policy in LEARNABLE:
            raise ConfigError(NO_ACTIVATIONS.format(policy))
        # Of activations under peft only the copies are in use.
        used = (p for n, p in model.named_parameters() if n in names and ".original_module." not in n)
        chosen = {id(p) for p in used} if policy in LEARNABLE else set()
        if policy in OTHERS:
            find, lacking = OTHERS[policy]
            others = find(model)
            if not others:
                raise ConfigError(f"train {policy!r}: {type(model).__name__} has no {lacking}; use 'activations'")
            chosen |= {id(p) for p in others}
        if new_head:
            chosen |= {id(p) for p in model.get_submodule(new_head).parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    freeze_domains(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def freeze_domains(model: nn.Module) -> None:
    """Keep the domains of all activations from being trained."""
    for module in model.modules():
        if isinstance(module, LearnableActivation):
            module.domain.requires_grad_(False)


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    base = f"{model.base_model_prefix}."
    parameters = (
        [p for n, p in model.named_parameters() if not n.startswith(base)] if model.base_model is not model else []
    )
    output = model.get_output_embeddings()
    return parameters + (list(output.parameters()) if output is not None else [])


def norm_layers(model: nn.Module) -> list[str]:
    """Paths of the layers whose class is named after a norm."""
    return [path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()]


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
