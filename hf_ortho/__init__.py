"""Learnable activations for transformers; importing registers their names in ``ACT2FN``."""

from importlib.metadata import version as _version

from . import activations, errors
from .conversion import ConversionReport, Histogram, convert, expand, polynomials, revert

__version__ = _version("hf_ortho")
__all__ = ["ConversionReport", "Histogram", "activations", "convert", "errors", "expand", "polynomials", "revert"]

activations.register()
