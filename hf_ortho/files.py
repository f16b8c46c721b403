"""Write a file whole or not at all, and know the files of a folder that were written here.

The manifest of a folder, ``.hf_ortho.json``, lists the SHA-256 of each, which tells them from all others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import CheckpointError, HfOrthoError, OutputError

logger = logging.getLogger("hf_ortho")

MANIFEST = ".hf_ortho.json"
TRAINING_MANIFEST = "manifest.json"  # the sizes of the files of a checkpoint of a training
DRAFT = ".hf_ortho-"


def explain(error: BaseException) -> str:
    """The first line that an exception has to say."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def json_object(file: str | os.PathLike) -> dict:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {explain(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return found


def why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or explain(error)


def failures() -> tuple[type[BaseException], ...]:
    """What writing raises; safetensors, if it is in use, has an error of its own, for a full disk too."""
    safetensors = sys.modules.get("safetensors")
    return (OSError,) if safetensors is None else (OSError, safetensors.SafetensorError)


# ---- one file ------------------------------------------------------------------------------------------------------


def check_file(path: str | os.PathLike, flag: str = "") -> Path:
    """The file that ``path`` leads to, which ``written`` can write as far as is known; for before any work is done.

    Raises:
        OutputError: it is a folder or device, or in no folder that can be written, or has a name that cannot be;
            ``flag`` is named.
    """
    name = f"{flag} {os.fspath(path)}".strip()
    try:
        target = Path(os.path.realpath(path))
        check_length(target.parent, target.name)
    except (OSError, ValueError) as error:
        raise OutputError(f"{name} cannot be written: {why(error)}") from error
    if target.is_dir():
        raise OutputError(f"{name} is a folder; name a file")
    if target.exists() and not target.is_file():
        raise OutputError(f"{name} is not a regular file; name another")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        reason = "cannot be written" if target.parent.is_dir() else "does not exist"
        raise OutputError(f"{name} cannot be written: the folder {target.parent} {reason}")
    return target


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
    """An empty draft beside ``path`` that takes its place if the block ends well, and vanishes if not.

    A symlink is followed. The file keeps its mode, or gets the mode of any new file. The manifest of its folder is left
    as it is: who names a single file wants to keep it.

    Raises:
        OutputError: the file cannot be written; what was at ``path`` is as before.
    """
    target = check_file(path)
    draft = target.with_name(token(DRAFT) + target.suffix[-16:])
    try:
        draft.touch(exist_ok=False)
        mode = _mode(target if target.exists() else draft)
        yield draft
        set_mode(draft, mode)
        os.replace(draft, target)
    except HfOrthoError:
        raise
    except failures() as error:
        raise OutputError(f"{os.fspath(path)} cannot be written: {why(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def use_umask(folder: Path) -> None:
    """Give each file below ``folder`` the mode of a new file there; safetensors hides its files from other users."""
    probe = folder / token(DRAFT)
    probe.touch()
    mode = _mode(probe)
    probe.unlink()
    for name in contents(folder):
        if not (folder / name).is_symlink() and (folder / name).is_file():
            set_mode(folder / name, mode | (_mode(folder / name) & 0o111))


def set_aside(path: Path) -> None:
    """Rename a file or folder that is in the way to a hidden name beside it, and say so."""
    names = (f".{path.name[:200]}.old{i or ''}" for i in range(10**6))
    kept = next(kept for kept in map(path.with_name, names) if not os.path.lexists(kept))
    os.rename(path, kept)
    logger.warning(f"note: {str(path)!r} was not as hf_ortho had written it; it is kept as {kept.name!r}")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def set_mode(path: Path, mode: int) -> None:
    if _mode(path) != mode:  # file systems without modes refuse to change them
        path.chmod(mode)


def token(prefix: str) -> str:
    return prefix + os.urandom(4).hex()


def check_length(folder: Path, name: str) -> None:
    """Raise what the file system says to a name, if that is not that there is no such file."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(folder / name)


# ---- the manifest of a folder --------------------------------------------------------------------------------------


def contents(folder: Path) -> list[str]:
    """All below ``folder`` but its manifest and drafts, as POSIX paths; of folders only empty ones, as ``name/``."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=fail):
        here = Path(place)
        if here == folder:
            folders[:] = [name for name in folders if not name.startswith(DRAFT)]
            names = [name for name in names if name != MANIFEST and not name.startswith(DRAFT)]
        elif not folders and not names:
            found.append(f"{here.relative_to(folder).as_posix()}/")
        links = [name for name in folders if (here / name).is_symlink()]  # which are not entered
        found += [(here / name).relative_to(folder).as_posix() for name in [*names, *links]]
    return sorted(found)


def checksum(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal; empty for what is no plain file."""
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):
            return ""
    except (FileNotFoundError, NotADirectoryError):
        return ""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def listed(folder: Path) -> dict[str, str]:
    """Name and sum of each file that was written here; a manifest that cannot be read lists none."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}
