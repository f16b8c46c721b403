"""Freezing policies, and the Trainer whose optimiser treats activations apart."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_optimizer import is_optimizer_factory

from ..activations import LearnableActivation
from ..errors import ConfigError
from .checkpoints import WholeCheckpoints
from .distributed import keep_float32
from .ema import ExponentialMovingAverage
from .guard import FiniteLoss
from .optimizer import param_groups, scale_steps

if TYPE_CHECKING:
    from .arguments import OptimizerArguments
    from .penalty import DomainPenalty

POLICIES = ("all", "activations", "activations+norms", "activations+head", "lora+activations", "head")


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
    model these are the input embeddings too). ``activations+norms``: these and the layers whose class is named after a
    norm (LayerNorm, RMSNorm, BatchNorm2d, ...). ``lora+activations``: these and the adapters of ``add_lora``. ``head``:
    the output head alone, to compare an original model with one trained as ``activations+head``.

    Raises:
        ConfigError: unknown policy, or the model has no learnable activations, norms, head or adapters to train.
    """
    if policy not in POLICIES:
        raise ConfigError(f"train {policy!r}: must be one of {', '.join(POLICIES)}")
    names = activation_parameters(model)
    if policy != "all":
        if not names and policy != "head":
            raise ConfigError(
                f"train {policy!r}: the model has no learnable activations; convert it first, or give --activation"
            )
        # Of activations under peft only the copies are in use.
        used = (p for n, p in model.named_parameters() if n in names and ".original_module." not in n)
        chosen = set() if policy == "head" else {id(p) for p in used}
        if policy in OTHERS:
            find, lacking = OTHERS[policy]
            others = find(model)
            if not others:
                raise ConfigError(f"train {policy!r}: {type(model).__name__} has no {lacking}; use 'activations'")
            chosen |= {id(p) for p in others}
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


def _norms(model: nn.Module) -> list[nn.Parameter]:
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return [p for module in norms for p in module.parameters(recurse=False)]


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if ".lora_" in n]


OTHERS = {
    "activations+norms": (_norms, "norms"),
    "activations+head": (_head, "head"),
    "lora+activations": (_adapters, "LoRA adapters"),
    "head": (_head, "head"),
}


class ActivationTrainer(FiniteLoss, WholeCheckpoints):
    """``Trainer`` with the parameter groups of ``param_groups``, for every optimiser that it knows by name.

    It also stops rather than save what is not finite, and resumes from whole checkpoints only.

    Args:
        optimizer_arguments: how the activations are optimised; None for the defaults.
        penalty: is added to losses that the model does not compute itself, as with label smoothing.
    """

    average: ExponentialMovingAverage | None = None

    def __init__(
        self,
        *args,
        optimizer_arguments: OptimizerArguments | None = None,
        penalty: DomainPenalty | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.optimizer_arguments = optimizer_arguments
        self.penalty = penalty
        if self.is_fsdp_enabled:
            keep_float32(self.accelerator.state.fsdp_plugin, self.accelerator.unwrap_model(self.model))

    def get_optimizer_cls_and_kwargs(self, args, model=None):  # type: ignore[override]  # static in Trainer
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        chosen = self.optimizer_arguments
        if not is_optimizer_factory(cls) and not kwargs.keys() & {"params", "model", "optimizer_dict"}:
            activation_lr = None if chosen is None else chosen.activation_learning_rate
            kwargs["params"] = param_groups(
                model, lr=args.learning_rate, weight_decay=args.weight_decay, activation_lr=activation_lr
            )
        elif chosen is not None and chosen.apart:
            raise ConfigError(f"optim {args.optim}: groups its parameters itself, so {chosen.apart} cannot be set")
        return cls, kwargs

    def create_optimizer(self, model=None):
        chosen = self.optimizer_arguments
        if self.optimizer is not None or chosen is None:
            return super().create_optimizer(model)
        if chosen.activation_natural_steps and self.is_deepspeed_enabled:
            raise ConfigError("activation_natural_steps: DeepSpeed flattens the parameters; use another engine")
        target: Any = self.model if model is None else model
        scale, natural = chosen.activation_gradient_scale, chosen.activation_natural_steps
        return scale_steps(super().create_optimizer(model), target, gradient_scale=scale, natural_steps=natural)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels")
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.penalty is None or not self.penalty.pending:
            return found
        term = self.penalty.loss(labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            term = term * (self.accelerator.num_processes // self.get_tp_size())
        return (found[0] + term, found[1]) if return_outputs else found + term

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate the averaged weights, if there are any."""
        if self.get_tp_size() > 1:  # every process has the results for all samples
            self.gather_function = lambda tensors: tensors
        with self.average.applied(self.optimizer) if self.average else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def autocast_smart_context_manager(self, cache_enabled=True):
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is None:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        freeze_domains(self.accelerator.unwrap_model(self.model))  # peft makes all that it loads trainable
