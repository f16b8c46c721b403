"""Files with which a model loads without hf_ortho."""

from __future__ import annotations

from pathlib import Path


def add_remote_code(folder: Path) -> dict[str, bytes]:
    """The files to add to or replace in the upload of ``folder``."""
    return {}
