"""Pictures of activations: source and learned shapes over their pre-activations, and how they moved in training."""

from .history import Snapshot, animate_history, plot_history
from .shapes import Panel, plot_activations

__all__ = ["Panel", "Snapshot", "animate_history", "plot_activations", "plot_history"]
