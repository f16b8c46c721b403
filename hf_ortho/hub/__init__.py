"""The model card, and code that loads a model without this package."""

from .card import Results, write_card
from .remote_code import add_remote_code, enable_remote_code

__all__ = ["Results", "add_remote_code", "enable_remote_code", "write_card"]
