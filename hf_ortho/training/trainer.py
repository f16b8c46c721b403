"""``ActivationTrainer``: Trainer with separate optimizer settings for activations."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory

from ..checkpoints.load import save_labels
from ..errors import ConfigError
from ..partitioned import gathered
from ..tasks.stream import Stream
from .arguments import OptimizerArguments
from .checkpoints import WholeCheckpoints
from .distributed import allow_no_embeddings, autocast_under_deepspeed, check_fsdp, keep_float32
from .ema import ExponentialMovingAverage
from .groups import group_counts
from .guard import FiniteLoss
from .optimizer import param_groups, scale_steps
from .penalty import DomainPenalty
from .policies import activation_parameters, freeze_domains
from .unreached import GradientWatch, check_reached

logger = logging.getLogger("hf_ortho")


def _makes_groups(cls: Any, options: dict[str, Any]) -> bool:
    """Whether an optimizer makes its own parameter groups."""
    return is_optimizer_factory(cls) or bool(options.keys() & {"params", "model", "optimizer_dict"})


def check_optimizer(arguments: TrainingArguments, model: Any, chosen: OptimizerArguments) -> None:
    """Raise ConfigError if ``chosen`` sets what the optimizer of ``arguments``, or of DeepSpeed, cannot do."""
    key = chosen.needs_own_groups
    if key and _makes_groups(*Trainer.get_optimizer_cls_and_kwargs(arguments, model)):
        raise ConfigError(f"optim {arguments.optim}: creates its own parameter groups, so {key} cannot be set")
    plugin = arguments.deepspeed_plugin
    if key and plugin is not None and "optimizer" in plugin.hf_ds_config.config:
        raise ConfigError(
            f"{key}: cannot be set with an optimizer in the DeepSpeed config, which takes one group; remove it there"
        )


class ActivationTrainer(FiniteLoss, WholeCheckpoints):
    """``Trainer`` with the parameter groups of ``param_groups``, for all named optimizers of ``TrainingArguments``.

    It also stops before saving a non-finite model, only resumes from complete checkpoints, and reports activations that
    got no gradient.

    Args:
        optimizer_arguments: how to optimize the activations; default: ``OptimizerArguments()``.
        penalty: penalty to add to losses that the model does not compute itself, such as with label smoothing.

    Example:
        >>> from transformers import TrainingArguments
        >>> from hf_ortho.training import ActivationTrainer, OptimizerArguments
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> arguments = TrainingArguments("out", learning_rate=1e-3, report_to=[])
        >>> faster = OptimizerArguments(activation_learning_rate=0.01)
        >>> trainer = ActivationTrainer(model, arguments, optimizer_arguments=faster)
        >>> [group["lr"] for group in trainer.create_optimizer().param_groups]
        [0.001, 0.001, 0.01]
    """

    average: ExponentialMovingAverage | None = None
    channels_last = False  # the memory format of the model, for images
    new_head = False  # of an adapter, whose classes are saved beside it
    _pushing = False

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
        check_fsdp(self.args)
        check_reached(self.accelerator.unwrap_model(self.model))
        if not self.is_deepspeed_enabled:
            self.add_callback(GradientWatch())
        elif all(p.dtype == torch.float32 for p in self.accelerator.unwrap_model(self.model).parameters()):
            autocast_under_deepspeed(self.accelerator.state.deepspeed_plugin.hf_ds_config.config, self.args)
        if self.is_fsdp_enabled:
            allow_no_embeddings(self.accelerator.unwrap_model(self.model))
            keep_float32(self.accelerator.state.fsdp_plugin, self.accelerator.unwrap_model(self.model))

    def get_optimizer_cls_and_kwargs(self, args, model=None):  # type: ignore[override]  # static in Trainer
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        chosen = self.optimizer_arguments
        if not _makes_groups(cls, kwargs):
            activation_lr = None if chosen is None else chosen.activation_learning_rate
            entries: Any = [] if chosen is None else chosen.param_groups
            options = {"weight_decay": args.weight_decay, "activation_lr": activation_lr, "groups": entries}
            kwargs["params"] = param_groups(model, lr=args.learning_rate, **options)
            if entries:
                logger.info(group_counts(model, kwargs["params"]))
        elif chosen is not None:
            check_optimizer(args, model, chosen)
        return cls, kwargs

    def get_train_dataloader(self):
        """With ``dispatch_batches: false``, each process reads its own part of a stream.

        Accelerate lets each process read the whole stream and drop the batches of the others.
        """
        loader = super().get_train_dataloader()
        shard = loader.dataset
        if isinstance(shard, IterableDatasetShard) and isinstance(shard.dataset, Stream):
            shard.dataset = shard.dataset.part(shard.process_index, shard.num_processes)
            shard.process_index, shard.num_processes = 0, 1  # nothing is left to drop
        return loader

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
            raise ConfigError(f"{key}: not supported by DeepSpeed, which flattens the parameters; use another engine")
        target: Any = self.model if model is None else model
        return scale_steps(super().create_optimizer(model), target, gradient_scale=scale, natural_steps=natural)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if self.channels_last:
            inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels")
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.penalty is None or not self.penalty.pending:
            return result
        term = self.penalty.loss(labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            term = term * (self.accelerator.num_processes // self.get_tp_size())
        return (result[0] + term, result[1]) if return_outputs else result + term

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate the averaged weights, if any."""
        if self.get_tp_size() > 1:  # every process already has the results for all samples
            self.gather_function = lambda tensors: tensors
        with self.average.applied(self.optimizer) if self.average else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def autocast_smart_context_manager(self, cache_enabled=True):
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is None:
            return self.accelerator.autocast()
        model: Any = self.model
        if self.is_deepspeed_enabled and not model.training:  # evaluation bypasses the engine and its autocast
            config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config.get("torch_autocast", {})
            if config.get("enabled"):
                return torch.autocast(self.args.device.type, getattr(torch, config["dtype"]))
        return super().autocast_smart_context_manager(cache_enabled)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model card of ``hf_ortho.hub`` to ``output_dir``. ``push_to_hub`` calls this after saving.

        Args:
            language, license, tags: metadata, as in ``Trainer``.
            dataset: name of the evaluation dataset. Other arguments of ``Trainer`` are ignored.
        """
        if self.is_world_process_zero():
            from .trainer_card import write_trainer_card  # imports all of hf_ortho.hub

            write_trainer_card(self, *args, **kwargs)
            if self._pushing:
                from ..hub.local_paths import remove_paths

                remove_paths(str(self.args.output_dir))

    def push_to_hub(self, *args, **kwargs):
        """Push as ``Trainer``; ``output_dir``, its card and its config then hold no local paths, as after a push."""
        self._pushing = True
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._pushing = False

    def _save(self, output_dir=None, state_dict=None):
        model = self.accelerator.unwrap_model(self.model)
        if self.is_deepspeed_enabled and isinstance(model, PeftModel):  # Trainer leaves out what is frozen
            names = {name for name in activation_parameters(model) if ".modules_to_save." in name}
            fixed = {name: p for name, p in model.named_parameters() if name in names and not p.requires_grad}
            with gathered(fixed.values()):
                if state_dict is not None:  # it is in the main process
                    state_dict |= {name: p.detach().cpu().clone() for name, p in fixed.items()}
        super()._save(output_dir, state_dict)
        if self.new_head:
            save_labels(model, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        freeze_domains(self.accelerator.unwrap_model(self.model))  # peft makes all loaded parameters trainable
