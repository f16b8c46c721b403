"""Export models to other formats than that of transformers."""
