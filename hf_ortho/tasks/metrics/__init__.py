"""``evaluate.Metric`` modules and the functions through which Trainer uses them."""

from .perplexity import Perplexity
from .top_k_accuracy import TopKAccuracy

__all__ = ["Perplexity", "TopKAccuracy"]
