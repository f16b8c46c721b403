"""``compute_metrics`` and ``preprocess_logits_for_metrics`` of the Trainer, per task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import evaluate
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from .perplexity import Perplexity
from .top_k_accuracy import TopKAccuracy


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What ``Trainer(compute_metrics=..., preprocess_logits_for_metrics=...)`` takes for one task."""

    compute_metrics: Callable[[EvalPrediction], dict]
    preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None


def _first(logits) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def token_losses(logits, labels: Tensor) -> Tensor:
    """-log p of each next token in nats, shape (batch, length - 1), float32; 0 where the label is -100."""
    scores = _first(logits)[:, :-1].float().transpose(1, 2)
    return cross_entropy(scores, labels[:, 1:], reduction="none", ignore_index=-100)


def perplexity(prediction: EvalPrediction) -> dict:
    """Loss and perplexity from the output of ``token_losses``."""
    labels = np.asarray(prediction.label_ids)[:, 1:].ravel()
    return Perplexity().compute(predictions=np.asarray(prediction.predictions).ravel(), references=labels)


def accuracy(prediction: EvalPrediction) -> dict:
    """Loss, top-1 and top-5 accuracy from logits."""
    logits = np.asarray(_first(prediction.predictions), dtype=np.float32)
    labels = np.asarray(prediction.label_ids)
    both = evaluate.combine([TopKAccuracy(k=1), TopKAccuracy(k=5)])
    loss = float(cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)))
    return {"loss": loss} | both.compute(predictions=logits, references=labels)


EVALUATORS = {
    "causal-lm": Evaluator(perplexity, token_losses),
    "image-classification": Evaluator(accuracy, None),
}
