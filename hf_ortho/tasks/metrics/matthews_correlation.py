"""Matthews correlation of a classifier as an ``evaluate`` module."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """Correlation of the predicted with the true classes, for any number of classes (Gorodkin, 2004).

With c correct predictions among s samples, p_k predictions of class k and t_k samples of class k:

    (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))

For two classes it is (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)). It is undefined, and by convention
0, if the predictions or the references are a single class."""


class MatthewsCorrelation(evaluate.Metric):
    """``compute(predictions=classes, references=labels)`` returns ``{"matthews_correlation": ...}``, in [-1, 1].

    Example:
        >>> metric = hf_ortho.training.MatthewsCorrelation()
        >>> metric.compute(predictions=[1, 1, 0, 0], references=[1, 1, 0, 0])
        {'matthews_correlation': 1.0}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: lists of int (classes).",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        predicted, true = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predicted, true)[:, None]
        p, t = ((values == classes).sum(1, dtype=np.float64) for values in (predicted, true))
        samples, correct = len(true), (predicted == true).sum()
        scale = (samples**2 - p @ p) * (samples**2 - t @ t)
        return {"matthews_correlation": float((correct * samples - p @ t) / np.sqrt(scale)) if scale else 0.0}
