"""Pearson correlation of predicted numbers as an ``evaluate`` module."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """Linear correlation of predictions x and references y, with a = x - mean(x) and b = y - mean(y):

    r = sum(a b) / sqrt(sum(a^2) sum(b^2))

It is undefined if x or y is constant. It is then 0, as Matthews correlation, so that the best of several models can be
selected (scipy gives NaN, with a warning). It is NaN if a value is not finite."""


class Pearson(evaluate.Metric):
    """``compute(predictions=numbers, references=labels)`` returns ``{"pearsonr": ...}``, in [-1, 1].

    Example:
        >>> metric = hf_ortho.training.Pearson()
        >>> metric.compute(predictions=[1.0, 2.0, 3.0], references=[0.0, 5.0, 10.0])
        {'pearsonr': 1.0}
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
        return {"pearsonr": correlation(np.asarray([predictions, references], dtype=np.float64))}


def correlation(values):
    """The correlation of two rows of numbers, float64 of shape (2, length), as in ``DESCRIPTION``."""
    if not np.isfinite(values).all():
        return float("nan")
    if not np.ptp(values, axis=1).all():
        return 0.0
    a, b = values - values.mean(1, keepdims=True)
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))
