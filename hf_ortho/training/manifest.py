"""The manifest of a training checkpoint, which distinguishes complete ones from leftovers of a killed process."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from ..files import TRAINING_MANIFEST as MANIFEST
from ..files import checksum, flush

# Errors on reading a foreign file: undecodable, not JSON, nested too deeply, or not an object.
UNREADABLE = (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError)
TORCH_FILES = (".pt", ".pth", ".bin")  # zip archives, with a CRC-32 of each record


def is_whole(checkpoint: Path) -> bool:
    """Whether all files in ``manifest.json`` exist with the right size, and ``trainer_state.json`` exists as well.

    The state is written after the manifest. A killed save leaves an empty manifest or no state. A killed deletion
    leaves a file missing. ``damaged_file`` checks the contents, which takes longer.
    """
    try:
        sizes = read_manifest(checkpoint)
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, (size, _) in sizes.items())
    except UNREADABLE:
        return False


def damaged_file(checkpoint: Path) -> str:
    """The first file of a checkpoint whose content is not that which was saved, or an empty string.

    Earlier versions saved no checksums, and a plain ``Trainer`` no manifest. In that case, this finds damage in files
    of ``torch.save``, which contain checksums, and safetensors files that cannot be opened.
    """
    try:
        saved = {name: digest for name, (_, digest) in read_manifest(checkpoint).items()}
    except UNREADABLE:
        saved = dict.fromkeys(sizes_of(checkpoint), "")
    return next((name for name, digest in saved.items() if _is_damaged(checkpoint / name, digest)), "")


def _is_damaged(file: Path, digest: str) -> bool:
    if digest:
        return checksum(Path(os.path.realpath(file))) != digest  # a link, as in the cache of the Hub
    try:
        if file.suffix in TORCH_FILES:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is not None
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return False
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError):
        return True
    return False


def write_manifest(checkpoint: Path) -> None:
    """Write a manifest with the sizes in bytes and the SHA-256 of all files of a checkpoint once they are on disk."""
    saved: dict[str, Any] = {}
    for name, size in sizes_of(checkpoint).items():
        flush(checkpoint / name)
        saved[name] = {"size": size, "sha256": checksum(checkpoint / name)}
    for folder in {(checkpoint / name).parent for name in saved}:
        flush(folder)
    (checkpoint / MANIFEST).write_text(json.dumps(saved, indent=1))
    flush(checkpoint / MANIFEST)


def read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file in the manifest. Earlier versions wrote the size alone, without a checksum."""
    saved = json.loads((checkpoint / MANIFEST).read_text())
    return {
        name: (entry, "") if isinstance(entry, int) else (entry["size"], entry["sha256"])
        for name, entry in saved.items()
    }


def sizes_of(checkpoint: Path) -> dict[str, int]:
    """Size in bytes of each file of a checkpoint except its manifest."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_symlink() or not p.is_dir())
    return {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in files if p != checkpoint / MANIFEST}
