"""The cards that sentence-transformers writes, of models with learnable activations."""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import nn

CODE = re.compile("(?<=```python\n)(?=from sentence_transformers import)")
UNNAMED = re.compile(r'(?<=\(")(sentence_transformers|multi_vector_encoder|cross_encoder|sparse_encoder)_model_id(?=")')


def name_requirement(base: Any) -> None:
    """Let the cards that the module ``sentence_transformers.base.model`` writes import hf_ortho, and have its tags.

    Without the import, the code in them would fail to load the model.
    """
    original = getattr(base, "generate_model_card", None)
    if original is None:  # another version: its cards stay as they are, and importing it must not fail
        return

    @functools.wraps(original)
    def generate_model_card(model: nn.Module) -> str:
        from ...activations import LearnableActivation
        from ...checkpoints.provenance import Provenance
        from .loading import import_line

        names = {module.name for module in model.modules() if isinstance(module, LearnableActivation)}
        if not names:
            return original(model)
        activation = ", ".join(sorted(names))
        card_data: Any = model.model_card_data
        card_data.add_tags(Provenance(activation).tags)
        return CODE.sub(lambda _: import_line(activation), original(model))

    base.generate_model_card = generate_model_card


def with_name(text: str, repo_id: str) -> str:
    """Such a card with ``repo_id`` for the placeholder of the name in its code."""
    return UNNAMED.sub(lambda _: repo_id, text)
