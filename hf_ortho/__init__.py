"""Learnable activations for transformers.

Importing this package registers the names in ``ACT2FN`` and the adapter in peft, or does so once these libraries are
imported. Everything else is imported lazily.
"""

import importlib
from importlib.metadata import version

import lazy_loader
from wrapt import register_post_import_hook

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("hf_ortho")


def _register_names(_) -> None:
    importlib.import_module(".activations.registry", __name__).register()


def _register_adapter(_) -> None:
    importlib.import_module(".peft", __name__)


register_post_import_hook(_register_names, "transformers.activations")
register_post_import_hook(_register_adapter, "peft")
