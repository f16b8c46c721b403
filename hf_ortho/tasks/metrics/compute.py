"""Implementations of ``compute_metrics`` and ``preprocess_logits_for_metrics`` for ``Trainer``."""

from __future__ import annotations

from collections.abc import Iterable

import evaluate
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import EvalPrediction
from transformers.loss.loss_utils import ForMaskedLMLoss

from .f1 import F1
from .matthews_correlation import MatthewsCorrelation
from .pearsonr import Pearson
from .perplexity import Perplexity
from .spearmanr import Spearman
from .top_k_accuracy import TopKAccuracy


def first_output(logits) -> Tensor:
    """The logits among the outputs of a model, such as hidden states."""
    return logits[0] if isinstance(logits, tuple) else logits


def token_losses(logits, labels: Tensor) -> Tensor:
    """-log p of each next token in nats: shape (batch, length - 1), float32; 0 where the label is -100."""
    scores = first_output(logits).float().flatten(0, 1)  # shifting the labels instead leaves the logits in place
    following = pad(labels[:, 1:], (0, 1), value=-100).flatten()
    return cross_entropy(scores, following, reduction="none", ignore_index=-100).view(labels.shape)[:, :-1]


def perplexity(prediction: EvalPrediction) -> dict:
    """Loss and perplexity from the output of ``token_losses``."""
    labels = np.asarray(prediction.label_ids)[:, 1:].ravel()
    return Perplexity().compute(predictions=np.asarray(prediction.predictions).ravel(), references=labels)


def masked_losses(logits, labels: Tensor) -> Tensor:
    """-log p of each masked token in nats: shape (batch, length), float32; 0 where the label is -100."""
    masked = labels != -100
    losses = torch.zeros(labels.shape, device=labels.device)
    losses[masked] = cross_entropy(first_output(logits)[masked].float(), labels[masked], reduction="none")
    return losses


def masked_loss(outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """``compute_loss_func`` of Trainer: -log p summed over the masked tokens, divided by ``num_items_in_batch``."""
    # Models such as BERT ignore num_items_in_batch, so their own loss is wrong with gradient accumulation.
    if num_items_in_batch is not None:  # 0 if all tokens of a batch are special
        num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
    logits = outputs["logits"]
    return ForMaskedLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)


def masked_perplexity(prediction: EvalPrediction) -> dict:
    """Loss and masked perplexity from the output of ``masked_losses``."""
    labels = np.asarray(prediction.label_ids).ravel()
    values = Perplexity().compute(predictions=np.asarray(prediction.predictions).ravel(), references=labels)
    return {"loss": values["loss"], "masked_perplexity": values["perplexity"]}


def accuracy(prediction: EvalPrediction, ks: Iterable[int]) -> dict:
    """Loss and top-k accuracy, for each k in ``ks``, from logits."""
    logits, labels = _arrays(prediction)
    ranks = evaluate.combine([TopKAccuracy(k=k) for k in ks])
    return {"loss": _loss(logits, labels)} | ranks.compute(predictions=logits, references=labels)


def classification(prediction: EvalPrediction) -> dict:
    """Loss, accuracy, F1 (of class 1 if there are two classes, else the mean) and Matthews correlation, from logits.

    A NaN logit is never the largest, as in ``TopKAccuracy``.
    """
    logits, labels = _arrays(prediction)
    numbers = ~np.isnan(logits)
    predicted = np.where(numbers.any(1), np.where(numbers, logits, -np.inf).argmax(1), -1)
    top = TopKAccuracy(k=1).compute(predictions=logits, references=labels)
    parts = [F1(average="binary" if logits.shape[1] == 2 else "macro"), MatthewsCorrelation()]
    others = evaluate.combine(parts).compute(predictions=predicted, references=labels)
    return {"loss": _loss(logits, labels), "accuracy": top["top1"]} | others


def regression(prediction: EvalPrediction) -> dict:
    """Loss (mean squared error), Pearson and Spearman correlation, from outputs of shape (samples, 1)."""
    outputs, labels = (array.astype(np.float64).ravel() for array in _arrays(prediction))
    correlations = evaluate.combine([Pearson(), Spearman()]).compute(predictions=outputs, references=labels)
    return {"loss": float(np.square(outputs - labels).mean())} | correlations


def _arrays(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(first_output(prediction.predictions), dtype=np.float32), np.asarray(prediction.label_ids)


def _loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)))
