"""Training checkpoints: which one to resume from, and which ones to remove."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from ..files import TRAINING_RECIPE, flush, set_aside, use_umask
from .distributed import main_decides
from .manifest import MANIFEST, UNREADABLE, damaged_file, is_whole, read_manifest, sizes_of, write_manifest

logger = logging.getLogger("hf_ortho")

PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"
START = '{\n "'  # how a manifest begins


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


def intact_checkpoints(whole: list[Path]) -> list[Path]:
    """The complete checkpoints up to the last one whose files are not damaged; logs a note for each later one.

    Every process must call it.
    """
    state = PartialState()
    while whole:
        found = damaged_file(whole[-1]) if state.is_local_main_process else ""
        damaged = next(filter(None, gather_object([found])), "")
        if not damaged:
            break
        if state.is_main_process:
            rest = f"resuming from {whole[-2].name}" if len(whole) > 1 else "no earlier one is complete"
            logger.warning(f"note: {whole[-1]} is damaged: {damaged} is not as it was saved; {rest}")
        whole = whole[:-1]
    return whole


def check_intact(checkpoint: Path) -> None:
    """Raise ConfigError if a checkpoint is damaged, with the last earlier one in its folder that is not."""
    if not (name := damaged_file(checkpoint)):
        return
    others = [p for p in checkpoints(checkpoint.parent) if is_whole(p) and p.name != checkpoint.name]
    if checkpoint.name.startswith(PREFIX) and checkpoint.name[len(PREFIX) :].isdecimal():
        others = [p for p in others if step_of(p) < step_of(checkpoint)]
    earlier = next((p for p in reversed(others) if not damaged_file(p)), None)
    rest = f"use {earlier}" if earlier else "there is no earlier complete checkpoint"
    raise ConfigError(f"resume_from_checkpoint {checkpoint}: {name} is damaged, not as it was saved; {rest}")


def resume_point(folder: Path, whole: list[Path], intact: list[Path], *, required: bool) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Args:
        whole: result of ``whole_checkpoints``.
        intact: result of ``intact_checkpoints``.
        required: whether a fresh start is an error. It is always an error if it could lose data: if the folder contains
            a model, checkpoints without ``manifest.json``, or only damaged ones.

    Raises:
        ConfigError: there is no complete checkpoint, and a fresh start is not allowed.
    """
    if intact:
        return intact[-1]
    if whole:
        raise ConfigError(
            f"resume_from_checkpoint: {folder} has no checkpoint that is not damaged ({whole[-1].name} is the last); "
            "use another output_dir"
        )
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
        sizes = {name: size for name, (size, _) in read_manifest(checkpoint).items()} if saved is None else saved
        present = sizes_of(checkpoint).items()
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

    ``manifest.json`` lists all files with their sizes and checksums once every process has written its files. It is
    followed by ``trainer_state.json``, and then by the deletions of ``save_total_limit``. These skip, and do not count,
    checkpoints with foreign files. ``train`` first removes the leftovers of killed saves.
    ``resume_from_checkpoint=True`` uses the last complete checkpoint that is not damaged. A finished training takes no
    more steps. ``recipe``, if set, is saved with each checkpoint.

    With multiple nodes, ``output_dir`` must be on a shared disk, or ``save_on_each_node`` must be set.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recipe: dict[str, Any] | None = None
        self.checked = ""  # a checkpoint that is known not to be damaged
        self._saved: dict[Path, dict[str, int]] = {}  # files of checkpoints without a manifest (save_only_model)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        folder = Path(str(self.args.output_dir))
        if resume_from_checkpoint is True:
            whole = whole_checkpoints(folder)
            resume_from_checkpoint = str(resume_point(folder, whole, intact_checkpoints(whole), required=True))
        elif resume_from_checkpoint and resume_from_checkpoint != self.checked:
            main_decides(self.args, lambda: check_intact(Path(resume_from_checkpoint)))
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
            flush(folder / TRAINER_STATE_NAME)
            flush(folder)
            if self.args.save_only_model:
                self._saved[folder] = sizes_of(folder)
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
            if self.recipe is not None:
                (Path(output_dir) / TRAINING_RECIPE).write_text(json.dumps(self.recipe, indent=1))
            write_manifest(Path(output_dir))
