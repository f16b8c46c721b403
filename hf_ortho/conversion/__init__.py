"""Convert pretrained models to learnable activations."""

from .calibrate import collect
from .convert import convert, revert
from .export import expand, polynomials
from .histogram import Histogram
from .report import ConversionReport, LayerReport
from .sites import Site, find_sites

__all__ = [
    "ConversionReport",
    "Histogram",
    "LayerReport",
    "Site",
    "collect",
    "convert",
    "expand",
    "find_sites",
    "polynomials",
    "revert",
]
