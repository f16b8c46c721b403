"""``evaluate.Metric`` modules, and how the Trainer feeds them."""

from .perplexity import Perplexity
from .top_k_accuracy import TopKAccuracy

__all__ = ["Perplexity", "TopKAccuracy"]
