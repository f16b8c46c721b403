"""Training checkpoints with a manifest, which distinguishes complete ones from leftovers of a killed process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from ..files import TRAINING_MANIFEST as MANIFEST
from ..files import set_aside, use_umask

PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"
START = '{\n "'  # how a manifest begins
# Errors on reading a foreign file: undecodable, not JSON, nested too deeply, or not an object.
UNREADABLE = (OSError, ValueError, RecursionError, AttributeError, TypeError)


def is_whole(checkpoint: Path) -> bool:
    """Whether all files in ``manifest.json`` exist with the right size, and ``trainer_state.json`` exists as well.

    The state is written after the manifest. A killed save leaves an empty manifest or no state. A killed deletion
    leaves a file missing.
    """
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except UNREADABLE:
        return False


def write_manifest(checkpoint: Path) -> None:
    """Write a manifest with the sizes of all files of a checkpoint, in bytes."""
    (checkpoint / MANIFEST).write_text(json.dumps(_sizes(checkpoint), indent=1))


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_symlink() or not p.is_dir())
    return {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in files if p != checkpoint / MANIFEST}


def checkpoints(folder: Path) -> list[Path]:
    """The ``checkpoint-N`` folders, sorted by N."""
    folders = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name[len(PREFIX) :].isdecimal()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of ``checkpoint-N``."""
    return int(checkpoint.name[len(PREFIX) :])


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that are complete for every process, sorted by step. Processes may have separate disks.

    Every process must call it.
    """
    names = gather_object([[p.name for p in checkpoints(folder) if is_whole(p)]])
    common = set.intersection(*map(set, names))
    return [p for p in checkpoints(folder) if p.name in common]


def resume_point(folder: Path, whole: list[Path], *, required: bool) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Args:
        whole: result of ``whole_checkpoints``.
        required: whether a fresh start is an error. It is always an error if it could lose data: if the folder contains
            a model, or checkpoints without ``manifest.json``.

    Raises:
        ConfigError: there is no complete checkpoint, and a fresh start is not allowed.
    """
    if whole:
        return whole[-1]
    present = checkpoints(folder)
    foreign = [p for p in present if not (p / MANIFEST).is_file()]
    if foreign:
        raise ConfigError(
            f"resume_from_checkpoint: {folder} has no checkpoint that is known to be complete, because "
            f"{foreign[-1].name} has no {MANIFEST}; if it is complete, use --resume_from_checkpoint {foreign[-1]}"
        )
    if required:
        reason = f"no complete checkpoint ({present[-1].name} is incomplete)" if present else "no checkpoint-N folder"
        raise ConfigError(
            f"resume_from_checkpoint true: {folder} has {reason}; "
            "use --resume_from_checkpoint auto to start from the beginning"
        )
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"resume_from_checkpoint auto: {folder} contains a model but no training checkpoint; use another output_dir"
        )
    return None


def _is_own(checkpoint: Path, saved: dict[str, int] | None = None) -> bool:
    """Whether a checkpoint contains only files of its save, with the sizes in ``saved`` (default: its manifest).

    Changed contents of the same size go unnoticed: checksums of gigabytes would take too long.
    """
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text()) if saved is None else saved
        present = _sizes(checkpoint).items()
        return not checkpoint.is_symlink() and all(
            name == TRAINER_STATE_NAME or sizes.get(name) == size for name, size in present
        )
    except UNREADABLE:
        return False


def _is_leftover(checkpoint: Path) -> bool:
    """Whether a checkpoint is the leftover of a killed save: its manifest is the initial one, or it has no state.

    Without the state, the manifest must be truncated, or list all existing files.
    """
    try:
        manifest = (checkpoint / MANIFEST).read_text()
    except UNREADABLE:
        return False
    if manifest == "{}":
        return True
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        return False
    except UNREADABLE:
        cut = START.startswith(manifest[: len(START)]) and not manifest.endswith("}")
        return cut or _is_own(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove the leftovers of killed saves from the output folder of a training, but no foreign or truncated files."""
    for checkpoint in filter(_is_leftover, checkpoints(folder)):
        shutil.rmtree(checkpoint, ignore_errors=True)


def make_way(checkpoint: Path) -> None:
    """Remove an earlier checkpoint of the same step if it contains only files of its save, else rename it."""
    if _is_own(checkpoint):
        shutil.rmtree(checkpoint, ignore_errors=True)
    elif os.path.lexists(checkpoint):
        set_aside(checkpoint)


class WholeCheckpoints(Trainer):
    """``Trainer`` that writes a manifest into each checkpoint and only resumes from complete ones.

    ``manifest.json`` lists all files with their sizes once every process has written its files. It is followed by
    ``trainer_state.json``, and then by the deletions of ``save_total_limit``. These skip, and do not count, checkpoints
    with foreign files. ``train`` first removes the leftovers of killed saves. ``resume_from_checkpoint=True`` uses the
    last complete checkpoint. A finished training takes no more steps.

    With multiple nodes, ``output_dir`` must be on a shared disk, or ``save_on_each_node`` must be set.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._saved: dict[Path, dict[str, int]] = {}  # files of checkpoints without a manifest (save_only_model)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        folder = Path(str(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(resume_point(folder, whole_checkpoints(folder), required=True))
        if self.args.should_save:
            remove_leftovers(folder)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            make_way(folder)
            folder.mkdir(parents=True)
            if not self.args.save_only_model:
                (folder / MANIFEST).write_text("{}")
        self.accelerator.wait_for_everyone()
        try:
            with self._without_deletions():
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save and not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.args.should_save:
            use_umask(folder)
            if self.args.save_only_model:
                self._saved[folder] = _sizes(folder)
            self._rotate(folder.parent, {folder.name})

    def _finalize_training(self, trial, *args, **kwargs):
        with self._without_deletions():
            output = super()._finalize_training(trial, *args, **kwargs)
        if self.args.save_total_limit == 1 and self.state.best_model_checkpoint:
            self._rotate(Path(self._get_output_dir(trial)), set())
        return output

    @contextlib.contextmanager
    def _without_deletions(self) -> Iterator[None]:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _rotate(self, folder: Path, protected: set[str]) -> None:
        """Delete the oldest checkpoints beyond ``save_total_limit``, except ``protected`` and the best."""
        limit = self.args.save_total_limit or 0
        if limit <= 0 or not self.args.should_save:
            return
        if best := self.state.best_model_checkpoint:
            protected = protected | {Path(best).name}
        own = [p for p in checkpoints(folder) if _is_own(p, self._saved.get(p))]
        own.sort(key=lambda p: (p.stat().st_mtime, step_of(p)))
        excess = len(own) - max(limit, len(protected))
        for checkpoint in [p for p in own if p.name not in protected][: max(excess, 0)]:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)  # the last file written by every process
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(Path(output_dir))
