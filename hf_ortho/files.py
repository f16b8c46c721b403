"""Write files atomically, and recognize the files of a folder that hf_ortho wrote.

The manifest of a folder, ``.hf_ortho.json``, lists the SHA-256 of each file written by hf_ortho.
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
TRAINING_MANIFEST = "manifest.json"  # sizes and checksums of the files of a training checkpoint
TRAINING_RECIPE = "training_recipe.json"  # settings of the training that saved a checkpoint
DRAFT = ".hf_ortho-"


def explain(error: BaseException) -> str:
    """The first non-empty line of an exception's message, with the next if it ends in a colon; or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def read_text(file: str | os.PathLike) -> str:
    """The text of a file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or is not UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {explain(error)}") from error


def json_object(file: str | os.PathLike) -> dict:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {explain(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or explain(error)


def failures() -> tuple[type[BaseException], ...]:
    """The exceptions that writing raises, including safetensors' error type if the library is imported."""
    safetensors = sys.modules.get("safetensors")
    return (OSError,) if safetensors is None else (OSError, safetensors.SafetensorError)


# ---- one file ------------------------------------------------------------------------------------------------------


def check_file(path: str | os.PathLike, flag: str = "") -> Path:
    """Check before any work is done that ``written`` can write ``path``; returns the path with symlinks resolved.

    Raises:
        OutputError: it is a folder or a device, its folder is missing or not writable, or its name is invalid. The
            message names ``flag``.
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
    """An empty draft beside ``path``, which replaces it if the block succeeds and is removed otherwise.

    Symlinks are followed. The file keeps its mode, or gets the default mode of a new file. The manifest of the folder
    does not list it: a later run does not replace a file that the user named.

    Raises:
        OutputError: the file cannot be written; ``path`` is unchanged.
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
    """Give each file below ``folder`` the default mode of a new file; safetensors makes its files private."""
    probe = folder / token(DRAFT)
    probe.touch()
    mode = _mode(probe)
    probe.unlink()
    for name in contents(folder):
        if not (folder / name).is_symlink() and (folder / name).is_file():
            set_mode(folder / name, mode | (_mode(folder / name) & 0o111))


def set_aside(path: Path) -> None:
    """Rename a file or folder that is in the way to a hidden name beside it, and log a note."""
    names = (f".{path.name[:200]}.old{i or ''}" for i in range(10**6))
    backup = next(backup for backup in map(path.with_name, names) if not os.path.lexists(backup))
    os.rename(path, backup)
    logger.warning(f"note: {str(path)!r} was not written by hf_ortho, or was changed; it is kept as {backup.name!r}")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def set_mode(path: Path, mode: int) -> None:
    if _mode(path) != mode:  # file systems without modes refuse to change them
        path.chmod(mode)


def token(prefix: str) -> str:
    return prefix + os.urandom(4).hex()


def check_length(folder: Path, name: str) -> None:
    """Raise the file system's error for a name, such as one that is too long. A missing file is not an error."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(folder / name)


# ---- the manifest of a folder --------------------------------------------------------------------------------------


def contents(folder: Path) -> list[str]:
    """POSIX paths of all files below ``folder`` except its manifest and drafts, and of empty folders as ``name/``."""

    def fail(error: OSError) -> None:
        raise error

    paths = []
    for place, folders, names in os.walk(folder, onerror=fail):
        here = Path(place)
        if here == folder:
            folders[:] = [name for name in folders if not name.startswith(DRAFT)]
            names = [name for name in names if name != MANIFEST and not name.startswith(DRAFT)]
        elif not folders and not names:
            paths.append(f"{here.relative_to(folder).as_posix()}/")
        links = [name for name in folders if (here / name).is_symlink()]  # os.walk does not follow them
        paths += [(here / name).relative_to(folder).as_posix() for name in [*names, *links]]
    return sorted(paths)


def checksum(file: Path) -> str:
    """The SHA-256 of a regular file in hexadecimal; empty for anything else."""
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


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the file system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def listed(folder: Path) -> dict[str, str]:
    """Name and checksum of each file that hf_ortho wrote to ``folder``; empty if the manifest cannot be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}
