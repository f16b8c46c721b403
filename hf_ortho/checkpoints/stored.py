"""The files of a model in a folder, or on the Hub and in its cache."""

from __future__ import annotations

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from . import weights


def stored_file(name: str, file: str, revision: str | None) -> str | None:
    """The local path of a file of a model, downloaded if needed; None if the model has no such file."""
    return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)


def weight_files(name: str, revision: str | None) -> dict[str, str] | None:
    """The file of each tensor of a model, by the tensor's name; None without safetensors weights.

    Raises:
        CheckpointError: the file or its index is damaged.
    """
    if single := stored_file(name, SAFE_WEIGHTS_NAME, revision):  # transformers prefers it as well
        return dict.fromkeys(weights.shapes(single), SAFE_WEIGHTS_NAME)
    if index := stored_file(name, SAFE_WEIGHTS_INDEX_NAME, revision):
        return weights.weight_map(index)
    return None
