"""Pictures of activations: source and learned shapes over their pre-activations, and how they moved in training."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
