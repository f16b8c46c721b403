"""What a command tells while it runs: announcements, progress bars, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..logs import logging_at
from ..text import duration, one_line
from .console import console

logger = logging.getLogger("hf_ortho")

MINUTE = 60.0  # seconds between lines
open_bars = contextlib.ExitStack()  # of a training; one that ends early leaves its bar


class Announcements(logging.Handler):
    """Prints the records of level INFO, in the main process: what a long command does at the moment.

    Others are left to the handlers of the application, or to the default of ``logging``.
    """

    def emit(self, record):
        if record.levelno > logging.INFO:
            if logging.lastResort is not None and not logging.getLogger().handlers:
                logging.lastResort.handle(record)
        elif os.environ.get("RANK", "0") == "0":
            console.print(one_line(record.getMessage()))


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """Within the block, print what hf_ortho logs with ``logger.info``. Afterwards no progress bar is left open."""
    handler = Announcements()
    logger.addHandler(handler)
    try:
        with logging_at(logging.INFO, "hf_ortho"):
            yield
    finally:
        open_bars.close()
        logger.removeHandler(handler)


@contextlib.contextmanager
def telling_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Within the block, an interruption is reported with ``kept()``: what it leaves, and how to continue."""
    try:
        yield
    except KeyboardInterrupt as stop:
        handlers = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
        try:  # a launcher may send a second signal
            open_bars.close()
            message = kept()
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler or signal.SIG_DFL)
        raise KeyboardInterrupt(one_line(message)) from stop


def announce_libraries() -> None:
    """Say that the libraries are being loaded, unless they are already."""
    if "torch" not in sys.modules:
        logger.info("Loading PyTorch and transformers")


@contextlib.contextmanager
def stage(text: str) -> Iterator[None]:
    """Tell in the main process what the block does: while it runs in a terminal, else in a line before it."""
    first = os.environ.get("RANK", "0") == "0"
    if first and not console.is_terminal:
        console.print(one_line(text))
    with console.status(one_line(text)) if first else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def progress(title: str) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar on one line, with the time that has passed and the time that is left.

    The total is unknown until set.
    """
    first, last = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(first, BarColumn(12), MofNCompleteColumn(), *times, last, console=console) as bar:
        yield bar, bar.add_task(one_line(title), total=None, note="")


@contextlib.contextmanager
def counted(batches: list[dict] | None) -> Iterator[list[dict] | None]:
    """The batches of a conversion; in a terminal, with a bar of those that were read, until the end of the block."""
    if batches is None or not console.is_terminal:
        yield batches
        return
    with progress("Converting") as (bar, task):

        class Counted(list):
            def __iter__(self):
                for i, batch in enumerate(super().__iter__(), 1):
                    yield batch
                    bar.update(task, completed=i, total=len(self))
                bar.update(task, total=None)  # a bar that moves

        yield Counted(batches)
        bar.update(task, completed=len(batches), total=len(batches))


def training_size():
    """A Trainer callback that prints the number of training samples, and the tokens of each if all have as many."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import has_length

    class Size(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            samples: Any = getattr(train_dataloader, "dataset", None)
            what, finite = "a stream of samples", has_length(samples)
            if finite:
                sample = samples[0]
                blocks = "input_ids" in sample and not isinstance(sample["labels"], int | float)  # not of a class
                kind = f"blocks of {len(sample['input_ids'])} tokens" if blocks else "samples"
                what = f"{len(samples)} {kind}"
            if state.is_world_process_zero:
                console.print(f"Training on {what} for {state.max_steps} steps")

    return Size()


def trainer_progress(title: str):
    """A Trainer callback that shows a progress bar with the latest loss, and one of each evaluation."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        bar: Any = None
        batches: TaskID | None = None  # the task of an evaluation

        def on_train_begin(self, args, state, control, **kwargs):
            open_bars.close()
            self.bar, self.task = open_bars.enter_context(progress(title))
            self.bar.update(self.task, total=state.max_steps, completed=state.global_step)

        def on_prediction_step(self, args, state, control, eval_dataloader: Any = None, **kwargs):
            if self.bar is None or not self.bar.live.is_started:  # not within a training
                self.bar, self.task = open_bars.enter_context(progress("Evaluating"))
                self.batches = self.task
            elif self.batches is None:
                self.batches = self.bar.add_task("Evaluating", note="")
            self.bar.update(self.batches, total=len(eval_dataloader), advance=1)

        def on_evaluate(self, args, state, control, **kwargs):
            if self.batches == self.task:
                open_bars.close()
            elif self.batches is not None:
                self.bar.remove_task(self.batches)
            self.batches = None

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(self.task, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                self.bar.update(self.task, note=f"loss {float(logs['loss']):.4f}")

        def on_train_end(self, args, state, control, **kwargs):
            open_bars.close()

    return Bar()


def evaluation_progress() -> list[Any]:
    """Callbacks for an evaluation with Trainer: a bar of its batches in a terminal, none elsewhere."""
    return [trainer_progress("")] if console.is_terminal else []


def trainer_log(title: str):
    """A Trainer callback that shows progress: a bar in a terminal, else one line per log of Trainer or per minute."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.start = self.last = time.monotonic()
            self.first = state.global_step

        def on_step_end(self, args, state, control, **kwargs):
            now, done = time.monotonic(), state.global_step - self.first
            if state.is_world_process_zero and now - self.last > MINUTE and state.global_step < state.max_steps:
                left = (now - self.start) / done * (state.max_steps - state.global_step)
                console.print(f"{title}: step {state.global_step}/{state.max_steps}, {duration(left)} left")
                self.last = now

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and logs and "loss" in logs:
                self.last = time.monotonic()
                rate = f", learning rate {float(logs['learning_rate']):.3g}" if "learning_rate" in logs else ""
                console.print(
                    f"{title}: step {state.global_step}/{state.max_steps}, loss {float(logs['loss']):.4f}{rate}"
                )

    first = os.environ.get("RANK", "0") == "0"
    return trainer_progress(title) if first and console.is_terminal else Lines()
