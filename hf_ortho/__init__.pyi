from . import activations as activations
from . import errors as errors
from . import peft as peft
from .conversion import ConversionReport as ConversionReport
from .conversion import Histogram as Histogram
from .conversion import convert as convert
from .conversion import expand as expand
from .conversion import polynomials as polynomials
from .conversion import revert as revert
from .recompute import fuse_mlp as fuse_mlp
from .training.guard import FiniteGuard as FiniteGuard
from .training.logger import ActivationLogger as ActivationLogger
from .training.optimizer import optimizer as optimizer
from .training.optimizer import optimizer_cls_and_kwargs as optimizer_cls_and_kwargs
from .training.optimizer import param_groups as param_groups
from .training.optimizer import scale_steps as scale_steps
from .training.penalty import DomainPenalty as DomainPenalty

__version__: str
