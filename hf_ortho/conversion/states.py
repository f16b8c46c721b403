"""The states that a model may be in: which of them can be converted, and what to do about the others."""

from __future__ import annotations

import itertools
import os
import re
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import SiteError
from ..partitioned import is_partitioned

ENGINES = ("torch.nn.parallel.distributed", "torch.distributed.", "deepspeed.")  # modules of the classes that wrap
ADAPTERS = (
    "{} has peft adapters, and only they would be saved, without the conversion: merge them first "
    "(merge_and_unload()), or add the activations as an adapter beside them, "
    "model.add_adapter(hf_ortho.peft.OrthoConfig(...))"
)
WRAPPED = "{} has already wrapped the model and knows only its present parameters: convert the model before that"
PARTITIONED = (
    "{} is partitioned by DeepSpeed ZeRO-3: convert and save it beforehand, or load it without a DeepSpeed config "
    "(`--accelerate-config zero3` partitions it after the conversion)"
)


def plain_model(model: Any) -> PreTrainedModel:
    """The transformers model to convert: ``model``, or what ``torch.compile`` wraps as ``model``.

    Raises:
        SiteError: it is none, adapters are attached, it is sharded, or weights are missing (offloaded, or meta).

    Example:
        >>> from hf_ortho.conversion.states import plain_model
        >>> plain_model(torch.compile(model)) is model
        True
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise SiteError(not_a_model(model))
    name = type(model).__name__
    if any(isinstance(module, _imported("peft.tuners.tuners_utils", "BaseTunerLayer")) for module in model.modules()):
        raise SiteError(ADAPTERS.format(name))
    if any(isinstance(module, _imported("torch.distributed.fsdp", "FSDPModule")) for module in model.modules()):
        raise SiteError(WRAPPED.format("FSDP2"))
    check_not_partitioned(model)
    for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise SiteError(
                f"{name} has no data for {key}: it is offloaded, or on the meta device; load the model without "
                "device_map (a conversion needs no GPU), convert and save it, and load the result with device_map; or "
                "add an adapter of activations (hf_ortho.peft.OrthoConfig)"
            )
    return model


def check_not_partitioned(model: nn.Module) -> None:
    """Raise SiteError if the weights are partitioned by DeepSpeed, so that ``model`` cannot run."""
    if any(map(is_partitioned, model.parameters())):
        raise SiteError(PARTITIONED.format(type(model).__name__))


def _imported(module: str, name: str) -> tuple[type, ...]:
    """The class, if its module has been imported: otherwise no object can be one of its instances."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def not_a_model(model: Any) -> str:
    """Why ``model``, which is not a transformers model, cannot be converted, and what can."""
    name = type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        place = os.fspath(model)
        return (
            f"{place!r:.200} is a name, not a model: load it first, for example with "
            "transformers.AutoModelForCausalLM.from_pretrained, or use `hf-ortho convert`"
        )
    if isinstance(model, type):
        return f"{model.__name__} is a class, not a model: pass {model.__name__}.from_pretrained(...)"
    if isinstance(model, nn.Module) and hasattr(model, "peft_config"):
        return ADAPTERS.format(name)
    if type(model).__module__.startswith(ENGINES):
        return WRAPPED.format(name)
    if inner := held_model(model):
        return f"{name} is not a transformers PreTrainedModel, but holds one: convert its {inner}"
    return f"{name} is not a transformers PreTrainedModel, so no config drives it"


def held_model(model: Any) -> str:
    """Where a wrapper, such as a pipeline, holds a model, written as Python; or empty."""
    modules = model.named_modules() if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).items()
    path = next((path for path, module in modules if isinstance(module, PreTrainedModel)), "")
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f".{path}") if path else ""
