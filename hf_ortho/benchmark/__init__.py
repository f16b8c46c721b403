"""Time and memory of the activations against the fixed ones, alone and inside models; what ``hf-ortho bench`` runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
