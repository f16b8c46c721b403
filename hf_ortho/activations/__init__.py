"""The activation families as plain modules, their registry and their fits."""

from .base import LearnableActivation
from .fit_report import FitReport
from .fourier import Fourier
from .hermite import Hermite
from .polynomial import PolynomialForm
from .registry import FAMILIES, build, named, parse, register
from .tropical import Tropical, TropicalRational

__all__ = [
    "FAMILIES",
    "FitReport",
    "Fourier",
    "Hermite",
    "LearnableActivation",
    "PolynomialForm",
    "Tropical",
    "TropicalRational",
    "build",
    "named",
    "parse",
    "register",
]
