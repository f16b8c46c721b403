"""Data, metrics and tokenizers of the tasks that models are trained for."""
