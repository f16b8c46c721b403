"""``evaluate.Metric`` modules, and how the Trainer feeds them."""

from .compute import EVALUATORS, Evaluator
from .perplexity import Perplexity
from .top_k_accuracy import TopKAccuracy

__all__ = ["EVALUATORS", "Evaluator", "Perplexity", "TopKAccuracy"]
