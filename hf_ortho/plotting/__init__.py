"""Plots of activations: source and learned shapes with their pre-activations, and changes during training."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
