"""Spearman correlation of predicted numbers as an ``evaluate`` module."""

import datasets
import evaluate
import numpy as np

from .pearsonr import correlation

DESCRIPTION = """Correlation of the ranks of predictions and references: with a and b the ranks minus their means,

    rho = sum(a b) / sqrt(sum(a^2) sum(b^2))

Equal values get the average of their ranks. It is undefined if the predictions or the references are constant, and is
then 0 (scipy gives NaN, with a warning). It is NaN if a value is not finite."""


class Spearman(evaluate.Metric):
    """``compute(predictions=numbers, references=labels)`` returns ``{"spearmanr": ...}``, in [-1, 1].

    Example:
        >>> metric = hf_ortho.training.Spearman()
        >>> metric.compute(predictions=[1.0, 2.0, 30.0], references=[0.0, 5.0, 6.0])
        {'spearmanr': 1.0}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: lists of float.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references):
        values = np.asarray([predictions, references], dtype=np.float64)
        return {"spearmanr": correlation(np.stack([_ranks(row) for row in values]))}


def _ranks(values):
    """Ranks from 1; equal values get the average of theirs. NaN where a value is not finite."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.where(np.isfinite(values), (np.cumsum(counts) - (counts - 1) / 2)[place], np.nan)
