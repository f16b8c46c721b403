"""Time and memory of the activations against the fixed ones, alone and inside models; what ``hf-ortho bench`` runs."""

from .plot import plot_results
from .results import Figure, NotRun, Results
from .run import SECTIONS
from .settings import FULL, QUICK, Settings
from .targets import TARGETS, TOLERANCE, Target, check

__all__ = [
    "FULL",
    "QUICK",
    "SECTIONS",
    "TARGETS",
    "TOLERANCE",
    "Figure",
    "NotRun",
    "Results",
    "Settings",
    "Target",
    "check",
    "plot_results",
]
