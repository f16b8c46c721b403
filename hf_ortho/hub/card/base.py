"""The base model, and the metadata that the card inherits from its card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ...checkpoints.revision import is_commit
from ...text import Markdown, code, markdown

LICENSE = ("license", "license_name", "license_link", "language")
TEXTS = (*LICENSE[:3], "library_name", "pipeline_tag")
LISTS = ("language", "tags", "datasets")  # a single text is also allowed
FORMATS = ("pytorch", "tf", "jax", "flax", "rust", "onnx", "openvino", "coreml", "tflite", "gguf", "mlx", "safetensors")


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        name: a folder or Hub name; None for a model built in memory.
        revision: commit on the Hub.
    """

    name: str | None
    revision: str | None

    @property
    def on_hub(self) -> bool:
        """Whether it is known to be on the Hub: by its commit, or by its revision or the cache if not a folder."""
        try:
            validate_repo_id(self.name or "")
        except HFValidationError:
            return False
        if is_commit(self.revision):
            return True
        known = self.revision is not None or isinstance(try_to_load_from_cache(str(self.name), "config.json"), str)
        return known and not Path(str(self.name)).exists()

    def inherited(self) -> dict[str, Any]:
        """License, language, library, task, tags and datasets from the card of the base model.

        Empty if the card is missing or unreachable. Values of another type are ignored, and so are the tags for the
        formats of its weights.
        """
        if self.name is None:
            return {}
        path = Path(self.name, "README.md")
        try:
            if self.on_hub:
                path = Path(hf_hub_download(self.name, "README.md", revision=self.revision))
            data = metadata_load(path) or {}
        except (OSError, ValueError, RecursionError, YAMLError):  # no such file, no network, not a card
            return {}
        found = {key: data[key] for key in TEXTS if isinstance(data.get(key), str) and data[key]}
        for key in LISTS:
            value = data.get(key)
            texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]
            texts = [text for text in texts if key != "tags" or text.lower() not in FORMATS]
            found |= {key: texts if isinstance(value, list) else texts[0]} if texts else {}
        return found

    def __str__(self) -> Markdown:
        if self.name is None:
            return markdown("a model built in memory")
        return Markdown(code(self.name) + (f" at commit {code(self.revision)}" if self.revision else ""))
