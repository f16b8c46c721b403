from .parts import TrainingDetails as TrainingDetails
from .write import PICTURE as PICTURE
from .write import card_of as card_of
from .write import card_text as card_text
from .write import write_card as write_card
