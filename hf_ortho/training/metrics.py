"""The metrics of a task, from what a Trainer has evaluated or logged."""

from __future__ import annotations

from transformers import Trainer

from ..tasks import METRICS


def metrics_of(trainer: Trainer) -> dict[str, float]:
    """Evaluate, with the Trainer's prefix and its throughput figures left out."""
    return _metrics_in(trainer.evaluate())


def metrics_at_start(trainer: Trainer) -> dict[str, float] | None:
    """The metrics that ``eval_on_start`` gave, of a resumed training too; None if there are none."""
    first = (entry for entry in trainer.state.log_history if entry["step"] == 0 and "eval_loss" in entry)
    return next(map(_metrics_in, first), None)


def metrics_logged(trainer: Trainer) -> dict[str, float] | None:
    """The metrics of the last evaluation after a step of the training; None if there was none."""
    later = (e for e in reversed(trainer.state.log_history) if e.get("step", 0) > 0 and "eval_loss" in e)
    return next(map(_metrics_in, later), None)


def _metrics_in(found: dict) -> dict[str, float]:
    # "loss" of our metrics is the mean over all tokens; the Trainer's own is a mean of batch means.
    return {key: float(found[f"eval_{key}"]) for key in METRICS if f"eval_{key}" in found}
