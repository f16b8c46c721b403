"""Pictures of activations: source and learned shapes over their pre-activations, and how they moved in training."""

from .fit import draw_fit
from .history import Snapshot, animate_history, plot_history
from .shapes import Panel, draw_activations, plot_activations, plot_stored

__all__ = [
    "Panel",
    "Snapshot",
    "animate_history",
    "draw_activations",
    "draw_fit",
    "plot_activations",
    "plot_history",
    "plot_stored",
]
