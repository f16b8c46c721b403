"""The model card."""

from .card import card_of, write_card
from .results import DataSource, Results, command_line, hardware

__all__ = ["DataSource", "Results", "card_of", "command_line", "hardware", "write_card"]
