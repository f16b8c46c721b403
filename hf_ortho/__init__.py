"""Learnable activations for transformers; importing registers their names in ``ACT2FN``."""

from importlib.metadata import version as _version

from . import activations, errors
from .conversion import ConversionReport, Histogram, convert, expand, polynomials, revert
from .recompute import fuse_mlp

__version__ = _version("hf_ortho")
__all__ = [
    "ConversionReport",
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
