"""Learnable activations for transformers; importing registers their names in ``ACT2FN``, and the adapter in peft."""

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from . import activations, errors, peft
from .conversion import ConversionReport, Histogram, convert, expand, polynomials, revert
from .recompute import fuse_mlp

if TYPE_CHECKING:
    from .training.guard import FiniteGuard
    from .training.logger import ActivationLogger
    from .training.optimizer import optimizer, param_groups, scale_steps
    from .training.penalty import DomainPenalty

__version__ = _version("hf_ortho")
__all__ = [
    "ActivationLogger",
    "ConversionReport",
    "DomainPenalty",
    "FiniteGuard",
    "Histogram",
    "activations",
    "convert",
    "errors",
    "expand",
    "fuse_mlp",
    "optimizer",
    "param_groups",
    "peft",
    "polynomials",
    "revert",
    "scale_steps",
]

# What trains is imported when it is first used: it brings Trainer and datasets.
_TRAINING = {
    "ActivationLogger": "logger",
    "DomainPenalty": "penalty",
    "FiniteGuard": "guard",
    "optimizer": "optimizer",
    "param_groups": "optimizer",
    "scale_steps": "optimizer",
}


def __getattr__(name: str):
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".training.{_TRAINING[name]}", __name__), name)


activations.register()
