"""Modules and parameters by their paths in the plain model, without what engines, compilers and peft add."""

from __future__ import annotations

import re
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..activations import LearnableActivation
from ..checkpoints.adapter import ATTRIBUTE

ADDED = re.compile(
    rf"\.(modules_to_save|{ATTRIBUTE})\.default\b|\.base_layer\b|(?<=\.lora_[AB])\.default\b"
    r"|\b_orig_mod\.|\._orig_mod$"
)


def activations_by_path(model: nn.Module) -> dict[str, LearnableActivation]:
    """The active learnable activations by path in the plain model, unwrapped from engines, compilers and peft.

    Where peft keeps an original and a trained copy (``modules_to_save``, ``OrthoConfig``), this is the trained copy.
    """
    return {
        plain_path(path): module
        for path, module in plain_model(model).named_modules()
        if isinstance(module, LearnableActivation) and not {"original_module", "base_layer"} & set(path.split("."))
    }


def plain_model(model: nn.Module) -> nn.Module:
    """The model without its wrappers: engines, ``torch.compile`` of the whole, peft."""
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def plain_path(path: str) -> str:
    """A path in ``plain_model`` without what ``torch.compile`` and peft insert."""
    return ADDED.sub("", path)


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter in the plain model, by its id; a tied parameter has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in plain_model(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_path(name))
    for name, parameter in model.named_parameters():  # of the wrapper itself, such as a prompt of peft
        names.setdefault(id(parameter), [plain_path(name)])
    return names
