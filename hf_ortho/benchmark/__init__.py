"""Benchmarks of ``hf-ortho bench``: time and memory against fixed activations, standalone and in models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
