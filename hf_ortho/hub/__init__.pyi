from .card import card_of as card_of
from .card import write_card as write_card
from .remote_code import add_remote_code as add_remote_code
from .remote_code import enable_remote_code as enable_remote_code
from .results import DataSource as DataSource
from .results import Results as Results
from .results import command_line as command_line
from .results import hardware as hardware
