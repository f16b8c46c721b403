"""Helpers for distributed training: decisions of the main process, full state dicts, float32 activations."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, TypeVar

import torch
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    compare_versions,
    is_deepspeed_available,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..activations import LearnableActivation
from ..checkpoints.adapter import adapter_config
from ..errors import ConfigError, HfOrthoError
from ..processes import together
from .arguments import Recipe

FSDP1 = (
    "FSDP version 1 is not supported: it flattens the parameters of activations with those of other layers; set "
    "fsdp_version to 2 in the Accelerate config, or version to 2 in fsdp_config"
)
DEEPSPEED = "0.19.8"  # the oldest version that trains as it should
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
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # under DeepSpeed None elsewhere
    elif any(isinstance(p, DTensor) for p in model.parameters()):  # sharded by transformers on loading
        state = model.state_dict()
        gathered = {k: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for k, v in state.items()}
        model.config.distributed_config = None  # else save_pretrained waits for all processes to call it
    else:
        return None
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in gathered.items() if name not in tied}


def fits_agree() -> contextlib.AbstractContextManager[None]:
    """Within the block, all processes get the fits of the first, also those without data."""
    return together(True, "the fit of the activations")


def fsdp_version(arguments: TrainingArguments) -> int | None:
    """The version of FSDP configured in the arguments, or by Accelerate in the environment; None without FSDP."""
    version = (getattr(arguments, "fsdp_plugin_args", None) or {}).get("fsdp_version")
    if version is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
    return None if version is None else int(version)


def check_fsdp(arguments: TrainingArguments) -> None:
    """Raise ConfigError if FSDP version 1 is configured."""
    if fsdp_version(arguments) == 1:
        raise ConfigError(FSDP1)


def check_deepspeed() -> None:
    """Raise ConfigError if DeepSpeed is missing, or so old that it may ignore the autocast of its config."""
    found = metadata.version("deepspeed") if is_deepspeed_available() else "none"
    if found == "none" or compare_versions("deepspeed", "<", DEEPSPEED):
        raise ConfigError(
            f"DeepSpeed {DEEPSPEED} or newer is required, found {found}: pip install 'deepspeed>={DEEPSPEED}'"
        )


@contextlib.contextmanager
def loading_whole(recipe: Recipe) -> Iterator[None]:
    """Within the block, models are loaded whole under DeepSpeed ZeRO-3 if ``zero3_init_flag`` is false, or to convert
    or merge them. Otherwise transformers partitions them on loading, whatever the flag."""
    model, plugin = recipe.model, recipe.training.deepspeed_plugin
    if plugin is None:
        yield
        return
    in_parts = plugin.zero3_init_flag and not model.activation and model.init != "scratch"
    if in_parts and adapter_config(str(model.model), model.model_revision) is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(getattr(plugin, "dschf", plugin.hf_ds_config))


def autocast_under_deepspeed(config: dict[str, Any] | None, arguments: TrainingArguments) -> None:
    """With ``bf16``, change the DeepSpeed ``config`` to autocast: its own bf16 rounds all parameters to bfloat16.

    Raises:
        ConfigError: this version of DeepSpeed is too old.
    """
    if config is None:
        return
    check_deepspeed()
    if arguments.bf16:
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def allow_no_embeddings(model: Any) -> None:
    """Let Accelerate shard models that raise when FSDP2 asks for their input embeddings, such as ConvNeXt."""
    try:
        getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        model.get_input_embeddings = lambda: None


def keep_float32(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Keep the parameters of activations in float32 under FSDP2, for a model of any dtype and with bf16."""
    activations = sorted({type(m).__name__ for m in model.modules() if isinstance(m, LearnableActivation)})
    if not activations:
        return
    plugin.mixed_precision_policy = None  # it would round all parameters; ActivationTrainer uses autocast instead
    if any(p.dtype != torch.float32 for p in model.parameters()):  # FSDP2 shards one dtype at a time
        layers = plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or []
        plugin.transformer_cls_names_to_wrap = [*layers, *activations]
