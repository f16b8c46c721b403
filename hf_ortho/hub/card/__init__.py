"""The model card: what a model or an adapter is (``CardParts``), and the template that puts it into words."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
