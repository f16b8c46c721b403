"""Folders that are being written, and what killed processes have left of them.

The process that writes or moves a draft holds a lock on the draft's manifest, so that a draft without a lock is a
leftover.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import IO

from .files import MANIFEST, logger, token

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(file: IO) -> bool | None:
    """Whether the file could be locked for as long as it is open; None if there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def new_draft(place: Path, prefix: str) -> tuple[Path, IO[str]]:
    """An empty folder but for its manifest, which is open and locked."""
    while True:
        draft = place / token(prefix)
        draft.mkdir()
        with contextlib.suppress(FileNotFoundError):  # a process that began just now took it for a leftover
            manifest = open(draft / MANIFEST, "x", encoding="utf-8")  # noqa: SIM115  # the caller closes it
            if lock(manifest) is not False and (draft / MANIFEST).exists():
                return draft, manifest
            manifest.close()


def sweep(place: Path, prefix: str) -> None:
    """Remove the drafts of processes that are gone."""
    for name in os.listdir(place):
        draft = place / name
        if not re.fullmatch(re.escape(prefix) + "[0-9a-f]{8}", name) or draft.is_symlink() or not draft.is_dir():
            continue
        try:
            with open(draft / MANIFEST, "r+") as manifest:
                locked = lock(manifest)
                if locked:
                    shutil.rmtree(draft, ignore_errors=True)
        except FileNotFoundError:
            locked = None
            with contextlib.suppress(OSError):
                draft.rmdir()
        if locked is None and draft.exists():
            logger.warning(f"note: {str(draft)!r} is a draft that may be left over; remove it if no process writes it")


def prune(folder: Path) -> None:
    """Remove the empty folders below ``folder``, and itself if it is empty then."""
    for place, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(place)
