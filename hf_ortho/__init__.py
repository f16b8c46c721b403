"""Learnable activations for transformers; importing registers their names in ``ACT2FN``."""

from importlib.metadata import version as _version

from . import activations, errors
from .conversion import ConversionReport, Histogram, convert, expand, polynomials, revert
from .recompute import fuse_mlp

__version__ = _version("hf_ortho")
__all__ = [
    "ConversionReport",
    "FiniteGuard",
    "Histogram",
    "activations",
    "convert",
    "errors",
    "expand",
    "fuse_mlp",
    "polynomials",
    "revert",
]

activations.register()


def __getattr__(name: str):
    if name == "FiniteGuard":  # Trainer takes seconds to import
        from .training import FiniteGuard

        return FiniteGuard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
