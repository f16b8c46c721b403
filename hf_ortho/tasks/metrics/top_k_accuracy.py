"""Top-k accuracy of a classifier, from logits, as an ``evaluate`` module."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """Fraction of samples whose label is among the k largest logits. A NaN logit counts as a miss. Ties go
to the lower class."""


class TopKAccuracy(evaluate.Metric):
    """``TopKAccuracy(k=1).compute(predictions=logits, references=labels)`` returns ``{"top1": ...}``, in [0, 1].

    Example:
        >>> metric = hf_ortho.training.TopKAccuracy(k=1)
        >>> metric.compute(predictions=[[0.1, 0.9], [0.8, 0.2]], references=[1, 1])
        {'top1': 0.5}
    """

    def __init__(self, *args, k: int = 1, **kwargs):
        if k < 1:
            raise ValueError(f"k {k}: must be at least 1")
        self.k = k
        super().__init__(*args, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: list of lists of float (logits); references: list of int (labels).",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        logits = np.asarray(predictions, dtype=np.float64)
        order = np.argsort(-logits, axis=1, kind="stable")[:, : self.k]  # NaN comes last
        ranked = ~np.isnan(np.take_along_axis(logits, order, axis=1))
        hit = ((order == np.asarray(references)[:, None]) & ranked).any(1)
        return {f"top{self.k}": float(hit.mean())}
