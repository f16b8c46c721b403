"""Helpers for distributed training: decisions of the main process, full state dicts, float32 activations."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from ..activations import LearnableActivation
from ..errors import ConfigError, HfOrthoError

FSDP1 = (
    "FSDP version 1 is not supported: it flattens the parameters of activations with those of other layers; set "
    "fsdp_version to 2 in the Accelerate config, or version to 2 in fsdp_config"
)
T = TypeVar("T")


def main_decides(arguments: TrainingArguments, question: Callable[[], T]) -> T:
    """The answer of the main process, broadcast to all processes.

    Use it for questions about files that the main process is about to write.

    Raises:
        HfOrthoError: the error of the main process, raised in all processes.
    """
    answer: list = [None, None]
    if arguments.process_index == 0:
        try:
            answer[0] = question()
        except HfOrthoError as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def full_state_dict(trainer: Trainer) -> dict[str, Tensor] | None:
    """The full tensors of a sharded model (FSDP, DeepSpeed, tensor parallelism), or None if it is not sharded.

    Every process must call it. The main process gets all tensors, on the CPU.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    elif any(isinstance(p, DTensor) for p in model.parameters()):  # sharded by transformers on loading
        state = model.state_dict()
        gathered = {k: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for k, v in state.items()}
        model.config.distributed_config = None  # else save_pretrained waits for all processes to call it
    else:
        return None
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in gathered.items() if name not in tied}


def check_fsdp(arguments: TrainingArguments) -> None:
    """Raise ConfigError if FSDP version 1 is configured: in the arguments, or by Accelerate in the environment."""
    version = (getattr(arguments, "fsdp_plugin_args", None) or {}).get("fsdp_version")
    if version is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
    if version is not None and int(version) == 1:
        raise ConfigError(FSDP1)


def keep_float32(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Keep the parameters of activations in float32 under FSDP2, for a model of any dtype and with bf16."""
    activations = sorted({type(m).__name__ for m in model.modules() if isinstance(m, LearnableActivation)})
    if not activations:
        return
    plugin.mixed_precision_policy = None  # it would round all parameters; ActivationTrainer uses autocast instead
    if any(p.dtype != torch.float32 for p in model.parameters()):  # FSDP2 shards one dtype at a time
        layers = plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or []
        plugin.transformer_cls_names_to_wrap = [*layers, *activations]
