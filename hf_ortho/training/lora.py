"""LoRA next to trained activations, with peft; merged at the end, so that a plain checkpoint is saved."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from ..activations import LearnableActivation
from ..conversion.sites import rebuild
from ..errors import ConfigError
from .arguments import LoraArguments


def add_lora(model: PreTrainedModel, arguments: LoraArguments, seed: int) -> PeftModel:
    """Wrap ``model`` with LoRA on its linear layers; the activations are trained as they are (``modules_to_save``).

    Raises:
        ConfigError: a value does not fit, or no layer has such a name.
    """
    activations = [path for path, module in model.named_modules() if isinstance(module, LearnableActivation)]
    set_seed(seed)  # of the adapters' initial values, the same in all processes
    try:
        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_target_modules or "all-linear",
            modules_to_save=activations or None,
        )
        with warnings.catch_warnings():  # peft warns of what it then sets right: the orientation of GPT-2's layers
            warnings.simplefilter("ignore")
            return cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        values = f"lora_r {arguments.lora_r}, lora_target_modules {arguments.lora_target_modules or 'all-linear'}"
        raise ConfigError(f"train 'lora+activations', {values}: {str(error).splitlines()[0]}") from error


def merge_lora(model: PeftModel, state_dict: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """The base model with the adapters added to its weights; ``state_dict`` stands for a model that is sharded."""
    whole = model
    if state_dict is not None:
        base = rebuild(cast(PreTrainedModel, model.get_base_model()), model.config)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = cast(PeftModel, get_peft_model(base, model.peft_config["default"]))
        whole.load_state_dict(state_dict, strict=False, assign=True)
        whole.tie_weights()
    return cast(PreTrainedModel, whole.merge_and_unload())
