"""The model card, the push to the Hub, and code that loads a model without this package."""

from .card import card_of, write_card
from .remote_code import add_remote_code, enable_remote_code
from .results import DataSource, Results, command_line, hardware

__all__ = [
    "DataSource",
    "Results",
    "add_remote_code",
    "card_of",
    "command_line",
    "enable_remote_code",
    "hardware",
    "write_card",
]
