"""The errors that user input can cause. Each is also a standard exception, such as ``ValueError`` or ``OSError``."""

from .text import one_line


class HfOrthoError(Exception):
    """Base class; the command line prints its message and exits with code 2.

    The message is one line, whatever the names in it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ActivationNameError(HfOrthoError, ValueError):
    """An activation name has an unknown family, degree or initialization."""


class WidthError(HfOrthoError, ValueError):
    """The channels of an input cannot be divided into the groups of an activation."""


class FitError(HfOrthoError, ValueError):
    """A function cannot be fitted: not element-wise, not finite, or without asymptotic slopes."""


class PolynomialError(HfOrthoError, ValueError):
    """An activation or a network is not a polynomial, has no finite domain, or has too many terms to expand."""


class SiteError(HfOrthoError, ValueError):
    """The config of a model does not select its activation, so a converted model could not be reloaded."""


class AdapterError(HfOrthoError, ValueError):
    """An adapter does not belong to the model, or adapters cannot be combined or merged as requested."""


class CalibrationError(HfOrthoError, ValueError):
    """Calibration batches are empty, of the wrong kind, or give non-finite pre-activations."""


class ConfigError(HfOrthoError, ValueError):
    """A recipe, flag or option is unknown, or its value is invalid."""


class DataError(HfOrthoError, ValueError):
    """A dataset cannot be read, or lacks a column that the task needs."""


class CheckpointError(HfOrthoError, OSError):
    """A model cannot be loaded from the given place."""


class OutputError(HfOrthoError, OSError):
    """A folder or file cannot be written; its previous content is unchanged."""


class HubError(HfOrthoError, OSError):
    """A model cannot be pushed to the Hub; nothing was committed there."""


class ProcessError(HfOrthoError, RuntimeError):
    """Values are spread over the processes of ``torch.distributed``, or some of these do not take part."""


class NonFiniteError(HfOrthoError, ArithmeticError):
    """The loss or a parameter became infinite or NaN during training; no such value was saved."""
