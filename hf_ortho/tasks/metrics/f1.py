"""F1 of a classifier as an ``evaluate`` module."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """F1 of a class is 2 TP / (2 TP + FP + FN), the harmonic mean of its precision and recall. It is 0 for a
class that is never predicted correctly.

``average="binary"`` is the F1 of class 1, as in GLUE. ``average="macro"`` is the mean of the F1 of all classes that
occur in the predictions or the references."""


class F1(evaluate.Metric):
    """``F1(average="macro").compute(predictions=classes, references=labels)`` returns ``{"f1": ...}``, in [0, 1].

    Example:
        >>> metric = hf_ortho.training.F1()
        >>> metric.compute(predictions=[1, 1, 0, 1], references=[1, 0, 0, 1])
        {'f1': 0.8}
    """

    def __init__(self, *args, average: str = "binary", **kwargs):
        if average not in ("binary", "macro"):
            raise ValueError(f"average {average!r}: must be binary or macro")
        self.average = average
        super().__init__(*args, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: lists of int (classes).",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        predicted, true = np.asarray(predictions), np.asarray(references)
        classes = [1] if self.average == "binary" else np.union1d(predicted, true)
        hits = np.array([((predicted == c) & (true == c)).sum() for c in classes])
        sizes = np.array([(predicted == c).sum() + (true == c).sum() for c in classes])  # 2 TP + FP + FN
        return {"f1": float((2 * hits / np.maximum(sizes, 1)).mean())}
