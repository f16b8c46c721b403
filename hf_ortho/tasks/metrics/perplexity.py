"""Perplexity of a causal language model from the negative log-likelihoods of its tokens, as an evaluate module."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """Mean negative log-likelihood per token, loss = mean(-log p) in nats, and perplexity = exp(loss).

Predictions are the tokens' negative log-likelihoods (not logits: a vocabulary per token would not fit in memory),
references the labels; where a label is -100 the token does not count."""


class Perplexity(evaluate.Metric):
    """``compute(predictions=nll, references=labels)`` gives ``{"loss": ..., "perplexity": ...}``."""

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
        kept = np.asarray(predictions, dtype=np.float64)[np.asarray(references) != -100]
        if not kept.size:
            raise ValueError("no token counts: every reference is -100")
        loss = float(kept.mean())
        with np.errstate(over="ignore"):
            return {"loss": loss, "perplexity": float(np.exp(loss))}
