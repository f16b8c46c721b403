"""Model cards: the facts about a model or an adapter (``CardParts``), and the template that presents them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
