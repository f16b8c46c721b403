"""``evaluate.Metric`` modules and the functions through which Trainer uses them."""

from .f1 import F1
from .matthews_correlation import MatthewsCorrelation
from .pearsonr import Pearson
from .perplexity import Perplexity
from .spearmanr import Spearman
from .top_k_accuracy import TopKAccuracy

__all__ = ["F1", "MatthewsCorrelation", "Pearson", "Perplexity", "Spearman", "TopKAccuracy"]
