"""The class that loads a checkpoint: named in its config, in transformers or in the code of its repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import CheckpointError
from .custom_code import custom_class, references, refusal
from .listing import MODULES
from .stored import stored_file

logger = logging.get_logger("hf_ortho")


def model_class(
    name: str,
    revision: str | None,
    config: PreTrainedConfig,
    trust_remote_code: bool,
    auto_classes: Sequence[str],
    auto_class: str | None = None,
) -> Any:
    """The class of ``auto_class``, else the one that the config names, else that of the first of ``auto_classes``.

    Raises:
        CheckpointError: there is no such class, or it is defined by code, which may not run.
    """
    named = class_names(config.architectures, name)
    if auto_class is not None:
        named, auto_classes = [], [auto_class]
    custom = references(getattr(config, "auto_map", None))
    if named:
        own = getattr(transformers, named[0], None)
        fits = [auto for auto, reference in custom.items() if reference.rpartition(".")[2] == named[0]]
    else:
        own = _class_of(config, auto_classes)
        fits = [auto for auto in auto_classes if auto in custom]
    is_model = isinstance(own, type) and issubclass(own, PreTrainedModel)
    if fits and not is_model and not trust_remote_code:
        raise refusal(name, custom[fits[0]], "the model")
    if fits and trust_remote_code:
        own = custom_class(name, revision, fits[0], custom[fits[0]])
    elif not is_model:
        if auto_class is not None:
            raise CheckpointError(f"{name} cannot be loaded with {auto_class}, which has no class for its config")
        problem = f"names no class under architectures, and {' or '.join(auto_classes)} has none for it"
        if named:
            problem = (
                f"names the class {named[0]!r} under architectures, but transformers {transformers.__version__} has no "
                "such model class"
            )
        raise CheckpointError(f"the config of {name} {problem}")
    cls: Any = own
    if not named and auto_class is None:
        logger.warning(f"note: the config of {name} names no class under architectures; it is loaded as {cls.__name__}")
    return cls


def class_names(architectures: Any, name: str) -> list[str]:
    """The model classes under ``architectures`` in the config of the model ``name``.

    Raises:
        CheckpointError: it is something else than a list of names.
    """
    names = architectures or []
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise CheckpointError(f"the config of {name}: architectures is {names!r:.80}; expected a list of class names")
    return names


def encoder_class(name: str, revision: str | None, model: PreTrainedModel, info: Mapping[str, Any]) -> Any | None:
    """The class of a sentence-transformers model without the head of ``model``; None for any other.

    Such checkpoints keep the class of the model that they were trained from, and are loaded with ``AutoModel``.
    """
    base, missing = f"{model.base_model_prefix}.", info["missing_keys"]
    if not missing or model.base_model is model or any(key.startswith(base) for key in missing):
        return None
    if not stored_file(name, MODULES, revision):
        return None
    cls = _class_of(model.config, ["AutoModel"])
    if cls is not None:
        logger.warning(f"note: {name} has no head of {type(model).__name__}; it is loaded as {cls.__name__}")
    return cls


def _class_of(config: PreTrainedConfig, auto_classes: Sequence[str]) -> Any | None:
    """The class in transformers of the first auto class that knows the config."""
    classes = (getattr(transformers, auto)._model_mapping.get(type(config), None) for auto in auto_classes)
    cls = next((cls for cls in classes if cls is not None), None)
    return cls[0] if isinstance(cls, tuple) else cls
