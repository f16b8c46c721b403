"""The Trainer whose optimizer treats activations apart."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers.trainer_optimizer import is_optimizer_factory

from ..errors import ConfigError
from .arguments import OptimizerArguments
from .checkpoints import WholeCheckpoints
from .distributed import keep_float32
from .ema import ExponentialMovingAverage
from .guard import FiniteLoss
from .optimizer import param_groups, scale_steps
from .penalty import DomainPenalty
from .policies import freeze_domains


class ActivationTrainer(FiniteLoss, WholeCheckpoints):
    """``Trainer`` with the parameter groups of ``param_groups``, for every optimizer that it knows by name.

    It also stops rather than save what is not finite, and resumes from whole checkpoints only.

    Args:
        optimizer_arguments: how the activations are optimized; None for the defaults.
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
        elif chosen is not None and chosen.needs_own_groups:
            raise ConfigError(
                f"optim {args.optim}: groups its parameters itself, so {chosen.needs_own_groups} cannot be set"
            )
        return cls, kwargs

    def create_optimizer(self, model=None):
        optimizer = self._create_optimizer(model)
        if self.average:
            self.average.prepare(optimizer)
        return optimizer

    def _create_optimizer(self, model):
        chosen = self.optimizer_arguments
        if self.optimizer is not None or chosen is None:
            return super().create_optimizer(model)
        scale, natural = chosen.activation_gradient_scale, chosen.activation_natural_steps
        if (scale != 1.0 or natural) and self.is_deepspeed_enabled:
            key = "activation_natural_steps" if natural else f"activation_gradient_scale {scale}"
            raise ConfigError(f"{key}: DeepSpeed flattens the parameters; use another engine")
        target: Any = self.model if model is None else model
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

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card of ``hf_ortho.hub`` into ``output_dir``; ``push_to_hub`` calls this once the model is there.

        Args:
            language, license, tags: go into the metadata, as with ``Trainer``.
            dataset: what the evaluation samples are called; the other arguments of ``Trainer`` change nothing.
        """
        if self.is_world_process_zero():
            from .trainer_card import write_trainer_card  # which needs all of hf_ortho.hub

            write_trainer_card(self, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        freeze_domains(self.accelerator.unwrap_model(self.model))  # peft makes all that it loads trainable
