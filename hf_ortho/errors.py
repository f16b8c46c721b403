"""Every error that a user's input can cause, each also a ``ValueError`` or an ``OSError`` where that fits."""


class HfOrthoError(Exception):
    """Base class; the command line prints its message as one line and exits with code 2."""


class ActivationNameError(HfOrthoError, ValueError):
    """No such family, degree or initialization."""


class FitError(HfOrthoError, ValueError):
    """A function cannot be fitted: not element-wise, not finite, or without asymptotic slopes."""


class PolynomialError(HfOrthoError, ValueError):
    """An activation or a network is no polynomial, lacks a finite domain, or has too many terms to expand."""


class SiteError(HfOrthoError, ValueError):
    """The config of a model does not drive its activation, so a conversion would not reload."""


class AdapterError(HfOrthoError, ValueError):
    """An adapter does not belong to the model, or adapters cannot be combined or merged as asked."""


class CalibrationError(HfOrthoError, ValueError):
    """Calibration batches are empty, of the wrong kind, or give non-finite pre-activations."""


class ConfigError(HfOrthoError, ValueError):
    """A recipe or a flag is unknown, or its value does not fit."""


class DataError(HfOrthoError, ValueError):
    """A dataset cannot be read, or lacks the column that the task needs."""


class CheckpointError(HfOrthoError, OSError):
    """A model cannot be loaded from the place named."""


class OutputError(HfOrthoError, OSError):
    """A folder or file cannot be written; what was there before is untouched."""


class HubError(HfOrthoError, OSError):
    """A model cannot be pushed to the Hub; nothing was committed there."""


class NonFiniteError(HfOrthoError, ArithmeticError):
    """The loss or the parameters of a training became infinite or not a number; nothing of that was saved."""
