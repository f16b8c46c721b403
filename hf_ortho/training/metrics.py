"""The metrics of a task from the evaluations and logs of a Trainer."""

from __future__ import annotations

from transformers import Trainer

from ..tasks import METRICS


def metrics_of(trainer: Trainer) -> dict[str, float]:
    """Evaluate and return the metrics of the task, without the prefix and throughput figures of Trainer."""
    return _metrics_in(trainer.evaluate())


def metrics_at_start(trainer: Trainer) -> dict[str, float] | None:
    """The metrics of ``eval_on_start``, also of a resumed training, or None."""
    first = (entry for entry in trainer.state.log_history if entry["step"] == 0 and "eval_loss" in entry)
    return next(map(_metrics_in, first), None)


def metrics_logged(trainer: Trainer) -> dict[str, float] | None:
    """The metrics of the last evaluation after a training step, or None."""
    later = (e for e in reversed(trainer.state.log_history) if e.get("step", 0) > 0 and "eval_loss" in e)
    return next(map(_metrics_in, later), None)


def _metrics_in(logs: dict) -> dict[str, float]:
    # Our "loss" is the mean over all tokens; the loss of Trainer is a mean of batch means.
    return {key: float(logs[f"eval_{key}"]) for key in METRICS if f"eval_{key}" in logs}
