from .fit import draw_fit as draw_fit
from .history import Snapshot as Snapshot
from .history import animate_history as animate_history
from .history import plot_history as plot_history
from .shapes import Panel as Panel
from .shapes import draw_activations as draw_activations
from .shapes import plot_activations as plot_activations
from .shapes import plot_stored as plot_stored
