"""Implementations of ``compute_metrics`` and ``preprocess_logits_for_metrics`` for ``Trainer``."""

from __future__ import annotations

from collections.abc import Iterable

import evaluate
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import EvalPrediction

from .perplexity import Perplexity
from .top_k_accuracy import TopKAccuracy


def _first(logits) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def token_losses(logits, labels: Tensor) -> Tensor:
    """-log p of each next token in nats: shape (batch, length - 1), float32; 0 where the label is -100."""
    scores = _first(logits).float().flatten(0, 1)  # shifting the labels instead leaves the logits in place
    following = pad(labels[:, 1:], (0, 1), value=-100).flatten()
    return cross_entropy(scores, following, reduction="none", ignore_index=-100).view(labels.shape)[:, :-1]


def perplexity(prediction: EvalPrediction) -> dict:
    """Loss and perplexity from the output of ``token_losses``."""
    labels = np.asarray(prediction.label_ids)[:, 1:].ravel()
    return Perplexity().compute(predictions=np.asarray(prediction.predictions).ravel(), references=labels)


def accuracy(prediction: EvalPrediction, ks: Iterable[int]) -> dict:
    """Loss and top-k accuracy, for each k in ``ks``, from logits."""
    logits = np.asarray(_first(prediction.predictions), dtype=np.float32)
    labels = np.asarray(prediction.label_ids)
    ranks = evaluate.combine([TopKAccuracy(k=k) for k in ks])
    loss = float(cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)))
    return {"loss": loss} | ranks.compute(predictions=logits, references=labels)
