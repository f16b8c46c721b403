"""Draft folders: create and lock them, and remove leftovers of killed processes.

The process that writes or moves a draft holds a lock on its manifest. A draft without a lock is a leftover.
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
    """Lock the file until it is closed. True if locked, False if another process holds it, None without file locks."""
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
    """A new folder with nothing but its manifest, which is open and locked."""
    while True:
        draft = place / token(prefix)
        draft.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process just removed it as a leftover
            manifest = open(draft / MANIFEST, "x", encoding="utf-8")  # noqa: SIM115  # the caller closes it
            if lock(manifest) is not False and (draft / MANIFEST).exists():
                return draft, manifest
            manifest.close()


def sweep(place: Path, prefix: str) -> None:
    """Remove the drafts of killed processes."""
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
            logger.warning(f"note: {str(draft)!r} may be a leftover draft; remove it if no process is writing it")


def prune(folder: Path) -> None:
    """Remove the empty folders below ``folder``, then ``folder`` itself if it is empty."""
    for place, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(place)
