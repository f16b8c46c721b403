"""Perplexity of a causal language model, from negative log-likelihoods, as an ``evaluate`` module."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """Mean negative log-likelihood per token, loss = mean(-log p) in nats, and perplexity = exp(loss).

Predictions are the negative log-likelihoods of the tokens (not logits: one vocabulary per token would not fit in
memory). References are the labels; tokens with label -100 are ignored."""


class Perplexity(evaluate.Metric):
    """``compute(predictions=nll, references=labels)`` returns ``{"loss": ..., "perplexity": ...}``.

    Example:
        >>> metric = hf_ortho.training.Perplexity()
        >>> metric.compute(predictions=[0.0, 0.0, 9.9], references=[5, 7, -100])
        {'loss': 0.0, 'perplexity': 1.0}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: list of float (nats per token); references: list of int (labels).",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        losses = np.asarray(predictions, dtype=np.float64)[np.asarray(references) != -100]
        if not losses.size:
            raise ValueError("no tokens to evaluate: every reference is -100")
        loss = float(losses.mean())
        with np.errstate(over="ignore"):
            return {"loss": loss, "perplexity": float(np.exp(loss))}
