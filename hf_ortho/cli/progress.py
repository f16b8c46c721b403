"""What a command tells while it runs: announcements, progress bars, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..logs import logging_at
from ..text import one_line
from .console import console

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
    logger, handler = logging.getLogger("hf_ortho"), Announcements()
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


@contextlib.contextmanager
def progress(title: str) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar on one line. The total is unknown until set."""
    first, last = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    with Progress(first, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), last, console=console) as bar:
        yield bar, bar.add_task(one_line(title), total=None, note="")


def training_size():
    """A Trainer callback that prints the number of training samples, and the tokens of each if all have as many."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import has_length

    class Size(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            samples: Any = getattr(train_dataloader, "dataset", None)
            finite = has_length(samples)  # a stream is not
            if state.is_world_process_zero and finite:
                sample = samples[0]
                blocks = "input_ids" in sample and not isinstance(sample["labels"], int | float)  # not of a class
                what = f"blocks of {len(sample['input_ids'])} tokens" if blocks else "samples"
                console.print(f"Training on {len(samples)} {what} for {state.max_steps} steps")

    return Size()


def trainer_progress(title: str):
    """A Trainer callback that shows a progress bar with the latest loss."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            open_bars.close()
            self.bar, self.task = open_bars.enter_context(progress(title))
            self.bar.update(self.task, total=state.max_steps, completed=state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(self.task, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                self.bar.update(self.task, note=f"loss {float(logs['loss']):.4f}")

        def on_train_end(self, args, state, control, **kwargs):
            open_bars.close()

    return Bar()


@contextlib.contextmanager
def evaluation_progress(title: str) -> Iterator[list[Any]]:
    """Callbacks for an evaluation with Trainer: a bar of its batches in a terminal, none elsewhere."""
    if not console.is_terminal:
        yield []
        return
    from transformers import TrainerCallback

    with progress(title) as (bar, task):

        class Bar(TrainerCallback):
            def on_prediction_step(self, args, state, control, eval_dataloader: Any = None, **kwargs):
                bar.update(task, total=len(eval_dataloader), advance=1)

        yield [Bar()]


def trainer_log(title: str):
    """A Trainer callback that shows progress: a bar in a terminal, else one line per log of Trainer."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and logs and "loss" in logs:
                rate = f", learning rate {float(logs['learning_rate']):.3g}" if "learning_rate" in logs else ""
                console.print(
                    f"{title}: step {state.global_step}/{state.max_steps}, loss {float(logs['loss']):.4f}{rate}"
                )

    first = os.environ.get("RANK", "0") == "0"
    return trainer_progress(title) if first and console.is_terminal else Lines()
