"""The base model, and the metadata that the card inherits from its card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ...checkpoints.revision import is_commit
from ...text import Markdown, code, markdown

INHERITED = ("license", "license_name", "license_link", "language")


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
        """License and language from the card of the base model; empty if the card is missing or unreachable."""
        if self.name is None:
            return {}
        path = Path(self.name, "README.md")
        try:
            if self.on_hub:
                path = Path(hf_hub_download(self.name, "README.md", revision=self.revision))
            data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        except (OSError, ValueError, YAMLError):  # no such file, no network, not a card
            return {}
        return {key: data.get(key) for key in INHERITED if data.get(key)}

    def __str__(self) -> Markdown:
        if self.name is None:
            return markdown("a model built in memory")
        return Markdown(code(self.name) + (f" at commit {code(self.revision)}" if self.revision else ""))
