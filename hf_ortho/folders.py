"""Write folders atomically, and replace only files that hf_ortho wrote.

A folder is written as a draft. If the folder does not exist yet, the draft lies beside it and is renamed to it.
Otherwise the draft lies inside. Once complete, it is renamed to ``.hf_ortho-ready``, and its files are moved into
place, the config files last: nothing loads without them. A process that is killed before this rename leaves the old
content and a draft, which the next run removes. A process that is killed after it leaves the complete new content, and
the next run moves the rest.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from . import drafts
from .drafts import lock, new_draft, prune, sweep
from .errors import HfOrthoError, OutputError
from .files import (
    DRAFT,
    MANIFEST,
    check_length,
    checksum,
    contents,
    failures,
    listed,
    logger,
    set_aside,
    set_mode,
    use_umask,
    why,
)

READY = f"{DRAFT}ready"
LAST = ("config.json", "adapter_config.json")  # nothing loads without them


def _move_in(target: Path) -> None:
    """Move the files of ``target/.hf_ortho-ready`` into ``target``; continues where an earlier call stopped.

    At any moment the folder loads as the old content, as the new content, or not at all. A file in the way that
    belongs to neither is set aside.
    """
    ready = target / READY
    if not (ready / MANIFEST).exists():  # removed last
        prune(ready)
        return
    about = json.loads((ready / MANIFEST).read_text(encoding="utf-8"))
    new, old = dict(about["files"]), dict(about["replaces"])
    left = (name for name in contents(ready) if not name.endswith("/"))
    pending = sorted(left, key=lambda name: (name in LAST, name))

    def known(name: str) -> bool:
        digest = checksum(target / name)
        return bool(digest) and digest in (old.get(name), new.get(name))

    def gone(name: str) -> bool:
        return name in old and name not in new and known(name)

    for name in pending:  # private weights stay private
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISREG(mode := os.lstat(target / name).st_mode):
                set_mode(ready / name, stat.S_IMODE(mode))
    # The old config files are removed before anything else, and the new ones are moved in last: in between, the folder
    # does not load. Every step can be repeated, so a killed process is continued by running all of them again.
    for name in LAST:
        if gone(name) or (name in pending and known(name)):
            (target / name).unlink()
    for name in filter(gone, contents(target)):
        (target / name).unlink()
    parents = {f"{parent}/" for name in old for parent in PurePosixPath(name).parents}
    for name in parents.intersection(contents(target)):  # they are empty now
        with contextlib.suppress(OSError):
            os.removedirs(target / name)
    for name in pending:
        file = target / name
        for parent in [target / part for part in reversed(PurePosixPath(name).parents[:-1])]:
            if os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir()):  # a link may lead anywhere
                set_aside(parent)
        if os.path.lexists(file) and not known(name):
            set_aside(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        os.replace(ready / name, file)
    published = ready / f"{DRAFT}manifest"  # without the "replaces" entry
    published.write_text(json.dumps({"files": new}, indent=1), encoding="utf-8")
    os.replace(published, target / MANIFEST)
    (ready / MANIFEST).unlink()
    prune(ready)


class OutputFolder:
    """An output folder, checked before any work is done and filled at the end::

        output = OutputFolder(args.output, overwrite=args.overwrite, keep=[args.model])
        ...  # the work
        with output.writing() as draft:
            model.save_pretrained(draft)

    Symlinks are followed. Leftovers of a killed process are completed or removed first.

    Args:
        folder: must not be or contain the home folder, the current folder or a path in ``keep``.
        overwrite: replace the files that hf_ortho wrote here before. They must be unchanged, and there must be no
            other files.
        keep: paths or glob patterns of inputs; the base model of an adapter is protected too. Paths that do not
            exist, such as the name of a model on the Hub, are skipped.
        beside: for the output folder of a training: other files may be there, and stay. If a new file has the name of
            one, the old one is renamed.

    Raises:
        OutputError: the folder cannot be written, or files in it would be lost.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        overwrite: bool = False,
        keep: Sequence[str | os.PathLike | None] = (),
        beside: bool = False,
    ):
        self.name, self.overwrite, self.beside = os.fspath(folder), overwrite, beside
        self._settled = False
        try:
            self.path = _place(self.name, keep)
            self._prefix = f"{DRAFT}{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]}-"
            with contextlib.suppress(FileNotFoundError, PermissionError):
                sweep(self.path.parent, self._prefix)
            self._finish_left_over()
            if (self.path / MANIFEST).is_dir():
                raise self._error(f"{MANIFEST} in it is a folder; move it away")
            self._old = listed(self.path)
            present = contents(self.path) if self.path.is_dir() else []
            self._foreign = {name for name in present if name not in self._old}
            self._check()
            changed = (name for name in present if name in self._old and checksum(self.path / name) != self._old[name])
            if name := next(changed, None):
                raise self._error(f"{name} in it was changed since hf_ortho wrote it; move it away, or name another")
        except HfOrthoError:
            raise
        except (OSError, ValueError) as error:
            raise self._error(why(error)) from error

    def _error(self, reason: str) -> OutputError:
        return OutputError(f"output folder {self.name}: {reason}")

    def _finish_left_over(self) -> None:
        if not self.path.is_dir():
            return
        sweep(self.path, DRAFT)
        try:
            with open(self.path / READY / MANIFEST, "r+") as manifest:
                locked = lock(manifest)
                if locked is False:
                    raise self._error("another process is writing it")
                if locked is None:
                    raise self._error(
                        f"another process is writing it, or was killed; if it was killed, move the files of {READY} "
                        "into it"
                    )
                _move_in(self.path)
                logger.warning(f"note: a killed process left {self.name!r} incomplete; it is complete now")
        except FileNotFoundError:
            prune(self.path / READY)
        except (IsADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # hf_ortho did not write this manifest
        if os.path.lexists(self.path / READY):
            raise self._error(f"{READY} in it was not written by hf_ortho; move it away")

    def _check(self) -> None:
        """Raise unless the folder is still free, or unchanged since the first check."""
        if self.beside or not self.path.is_dir():
            return
        if listed(self.path) != self._old:
            raise self._error("another process wrote it in the meantime; name another")
        present = contents(self.path)
        if name := next((name for name in present if name not in self._old), None):
            raise self._error(f"it is not empty: {name} in it was not written by hf_ortho; name another")
        if present and not self.overwrite:
            raise self._error("it is not empty; pass --overwrite to replace what hf_ortho wrote there, or name another")

    @contextlib.contextmanager
    def writing(self, made: Iterable[str] = ()) -> Iterator[Path]:
        """A draft folder that becomes the content of the folder if the block succeeds; otherwise nothing changes.

        Args:
            made: names of files that this run may already have put into the folder. They are replaced, unless they
                were there at the first check.

        Raises:
            OutputError: writing failed, for example on a full disk, or the folder is not free anymore.
        """
        new = [place for place in (self.path, *self.path.parents) if not os.path.lexists(place)]
        draft, self._settled = None, False
        try:
            self._check()
            inside = self.beside or self.path.is_dir()
            place = self.path if inside else self.path.parent
            place.mkdir(parents=True, exist_ok=True)
            draft, manifest = new_draft(place, DRAFT if inside else self._prefix)
            with manifest:
                yield draft
                self._seal(draft, manifest, made)
                if drafts.fcntl is None:
                    manifest.close()  # Windows cannot rename a folder with an open file
                publish = self._publish_inside if inside else self._publish
                try:
                    publish(draft)
                except KeyboardInterrupt:  # everything is written: finish moving, which is quick
                    publish(draft)
                    raise
        except HfOrthoError:
            raise
        except failures() as error:
            if self._settled:
                reason = f"only part of the new content is in place; the next run moves the rest out of {READY}"
            else:
                reason = "it cannot be written; nothing was changed"
            raise self._error(f"{reason}: {why(error)}") from error
        finally:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)
            for place in new:
                with contextlib.suppress(OSError):
                    place.rmdir()

    def _seal(self, draft: Path, manifest: IO[str], made: Iterable[str]) -> None:
        prune(draft)
        use_umask(draft)
        files = {name: checksum(draft / name) for name in contents(draft)}
        replaceable = [name for name in made if name in files and name not in self._foreign]
        replaced = listed(self.path) | {name: checksum(self.path / name) for name in replaceable}
        json.dump({"files": files, "replaces": replaced}, manifest, indent=1)
        manifest.flush()

    def _publish(self, draft: Path) -> None:
        if draft.exists():
            try:
                os.rename(draft, self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise self._error("another process wrote it in the meantime; name another") from error

    def _publish_inside(self, draft: Path) -> None:
        ready = self.path / READY
        if draft.exists():
            try:
                os.rename(draft, ready)  # succeeds in one process only
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise self._error("another process is writing it") from error
        if not self._settled:
            try:
                self._check()
            except (HfOrthoError, OSError):
                os.rename(ready, draft)
                raise
            self._settled = True
        _move_in(self.path)


def _place(name: str, keep: Sequence[str | os.PathLike | None]) -> Path:
    """The resolved path of ``name``, checked as ``OutputFolder`` describes."""
    if not name:
        raise OutputError("the name of the output folder is empty; name a folder")
    if "\0" in name:
        raise OutputError(f"output folder {name!r}: a name cannot hold a NUL character")
    path = Path(os.path.realpath(name))
    check_length(path, f"{READY}/{'x' * 64}")
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    for part in path.relative_to(there).parts:
        check_length(there, part)
    if not there.is_dir():
        raise OutputError(f"output folder {name}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"output folder {name}: {there} cannot be written")
    if not path.is_dir():
        return path
    inputs = [place for name in keep if name for place in (*_matches(name), base_of(name)) if place]
    inputs = [place for place in inputs if os.path.exists(place)]
    places = [(f"the input {place}", place) for place in inputs]
    for what, place in [*places, ("the current folder", os.getcwd()), ("the home folder", os.path.expanduser("~"))]:
        real = Path(os.path.realpath(place))
        if real.exists() and os.path.samefile(path, real):
            raise OutputError(f"output folder {name} is {what}; name another")
        if any(os.path.samefile(path, parent) for parent in real.parents if parent.exists()):
            raise OutputError(f"output folder {name} contains {what}; name another")
    return path


def _matches(name: str | os.PathLike) -> list[str]:
    """A path, or the paths that match a glob pattern."""
    return [os.fspath(name)] if os.path.exists(name) else glob.glob(os.fspath(name), recursive=True)


def base_of(model: str | os.PathLike) -> str | None:
    """The base model of an adapter in a folder; None if unknown."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        base = json.loads(Path(model, "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        return base if isinstance(base, str) else None
    return None
