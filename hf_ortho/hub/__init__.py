"""The model card."""

from .card import Results, write_card

__all__ = ["Results", "write_card"]
