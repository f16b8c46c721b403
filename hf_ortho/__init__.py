"""Learnable activations for transformers.

Importing this package registers the names in ``ACT2FN`` and the adapter in peft, or does so once these libraries are
imported. Likewise, ``Trainer`` of transformers does not decay activations, Accelerate says if another optimizer does,
liger-kernel does not bypass them (see ``training.patches``), and the cards of sentence-transformers import this package
(see ``hub.card.sentence``). Everything else is imported lazily.
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


def _patch_trainer(trainer) -> None:
    importlib.import_module(".training.patches", __name__).exempt_from_weight_decay(trainer)


def _patch_accelerator(accelerator) -> None:
    importlib.import_module(".training.patches", __name__).report_weight_decay(accelerator)


def _patch_liger(liger) -> None:
    importlib.import_module(".training.patches", __name__).keep_from_liger(liger)


def _patch_sentence_cards(base) -> None:
    importlib.import_module(".hub.card.sentence", __name__).name_requirement(base)


register_post_import_hook(_register_names, "transformers.activations")
register_post_import_hook(_register_adapter, "peft")
register_post_import_hook(_patch_trainer, "transformers.trainer")
register_post_import_hook(_patch_accelerator, "accelerate.accelerator")
register_post_import_hook(_patch_liger, "liger_kernel.transformers")
register_post_import_hook(_patch_sentence_cards, "sentence_transformers.base.model")
