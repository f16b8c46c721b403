"""The base class of all families: parameters, domain, tails, dtype rules and loading through transformers."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.utils import logging

from ..errors import ActivationNameError, FitError, ProcessError
from ..fitting.density import Density, gaussian_moments
from ..fitting.least_squares import Balanced, Target
from ..fitting.options import FitOptions
from ..fitting.report import FitReport
from ..kernels import cpu, dispatch, formula
from ..kernels.groups import broadcasting, joined
from ..partitioned import gathered, is_partitioned
from .fit import Function, fit, report_of, targets_of
from .registry import MAX_DEGREE, MAX_GROUPS

logger = logging.get_logger("hf_ortho")

INITIALIZATIONS = ("paper", "unit")
SHARED = ("domain", "tail_slopes")  # the tensors common to all families, frozen by default


class LearnableActivation(nn.Module):
    r"""An activation with learnable parameters, a domain and straight tails.

    With t = clamp(x, lo, hi) and the family's series S,

        f(x) = S(t) + s_lo * min(x - lo, 0) + s_hi * max(x - hi, 0).

    ``domain`` = [lo, hi] and ``tail_slopes`` = [s_lo, s_hi] are float32 parameters, frozen by default. The default
    domain [-inf, inf] gives the paper's pure series. The parameters of the series are float32 vectors, shared over all
    positions and channels.

    With N groups, the last dimension of the input is split into N groups of consecutive channels, and each has its own
    function: the domain and the parameters get a leading dimension of N; ``tail_slopes`` are common to all.

    The input may have any shape and floating dtype; the output has the same. Arithmetic is at least float32, and the
    parameters stay float32 under ``.half()`` and ``.to(torch.bfloat16)`` (``.double()`` makes them float64). A library
    that assigns ``p.data = p.data.to(torch.bfloat16)`` rounds them; the next ``.to(...)`` or ``.float()`` of the model
    makes them float32 again, without the digits that were lost.

    A subclass must define ``family``, ``equation``, ``default_degree``, ``initial_parameters``, ``series``,
    ``series_derivative`` and ``fit_parameters``, and needs a line in ``registry.FAMILIES``. Optional are
    ``natural_units``, ``breaks`` (if f' jumps inside the domain) and the faster kernels ``cpu_series`` (with
    groups also ``cpu_rows``), ``compiled`` and ``triton``; without them, the formula is used. If you override the
    ``series`` of a family, reset ``cpu_series``, ``compiled`` and ``triton`` to None. A polynomial family derives from
    ``polynomial.PolynomialActivation``.

    Args:
        degree: 1 to 32; None for the family's default.
        init: ``"paper"`` (arXiv 2502.01247, section 3) or ``"unit"``, scaled to E[f(x)^2] = 1 for x ~ N(0, 1).
        groups: the number of groups of channels.

    Raises:
        ActivationNameError: the degree, the initialization or the number of groups does not exist.
        WidthError: in ``forward``: the last dimension of the input is not a multiple of ``groups``.

    Example:
        >>> from hf_ortho.activations import Hermite, LearnableActivation
        >>> activation = Hermite(8)
        >>> isinstance(activation, LearnableActivation), activation.name
        (True, 'hermite_8')
        >>> activation(torch.randn(2, 3, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    family: ClassVar[str]
    equation: ClassVar[str]  # S(x) = ..., as shown in model cards
    default_degree: ClassVar[int]
    default_derivative_weight: ClassVar[float] = 0.03  # lambda of a fit
    cpu_series: ClassVar[Callable[..., cpu.Series] | None] = None  # CPU kernel: makes a Series
    cpu_rows: ClassVar[Callable[..., cpu.Series] | None] = None  # the same for groups of channels, see cpu.Series
    compiled: ClassVar[type | None] = None  # explicit gradients for torch.compile, see dispatch._Compiled
    triton: ClassVar[str | None] = None  # CUDA kernel: module:NAME of DeviceFunctions, imported lazily
    series: ClassVar[Callable[..., Tensor]]  # (x, *parameters) to S(x), all of one dtype
    series_derivative: ClassVar[Callable[..., Tensor]]  # (x, *parameters) to S'(x), likewise
    domain: nn.Parameter
    tail_slopes: nn.Parameter

    def __init__(self, degree: int | None = None, *, init: str = "paper", groups: int = 1):
        super().__init__()
        degree = self.default_degree if degree is None else degree
        for name, value, most in (("degree", degree, MAX_DEGREE), ("groups", groups, MAX_GROUPS)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ActivationNameError(f"{name} {value!r} of {self.family}: must be an integer from 1 to {most}")
        if init not in INITIALIZATIONS:
            raise ActivationNameError(f"init {init!r} of {self.family}: must be one of {', '.join(INITIALIZATIONS)}")
        self.degree = degree
        self.init = init
        self.groups = groups
        self._create(self.initial_parameters(degree, init))

    def _create(self, initial: dict[str, list[float]]) -> None:
        # Python floats survive construction on the meta device.
        self._initial = {name: list(values) for name, values in initial.items()}
        self._names = *SHARED, *self._initial
        self._initial |= {"domain": [-math.inf, math.inf], "tail_slopes": [0.0, 0.0]}
        # An explicit float32 keeps float32 on every load path of transformers.
        for name, values in self._initial.items():
            shape = (len(values),) if self.groups == 1 or name == "tail_slopes" else (self.groups, len(values))
            empty = torch.empty(shape, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=name not in SHARED))
        self._initialized = False
        if not self.domain.is_meta:
            self.reset_parameters()

    # ---- defined by a family ---------------------------------------------------------------------------------------

    @classmethod
    def initial_parameters(cls, degree: int, init: str) -> dict[str, list[float]]:
        """Name and initial value of each parameter vector, in the order of ``named_parameters``."""
        raise NotImplementedError

    def fit_parameters(
        self, target: Target, near: Balanced | None = None
    ) -> tuple[dict[str, np.ndarray], str, Balanced]:
        """Values of the parameters (including ``domain``) fitted to ``target``, a note for the report, and the start
        ``near`` for a fit to similar data."""
        raise NotImplementedError

    def natural_units(self) -> dict[str, list[float]]:
        """Per-entry step sizes that change f by about the same amount. Parameters not listed use 1."""
        return {}

    def breaks(self) -> tuple[float, ...]:
        """Points where f' jumps, in ascending order."""
        return tuple(v for v in self.domain.tolist() if math.isfinite(v))

    # ---- evaluation ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name in ``ACT2FN``, for example ``hermite_8``."""
        return f"{self.family}_{self.degree}" + (f"_g{self.groups}" if self.groups > 1 else "")

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.activation(type(self), x, *self._tensors())

    @classmethod
    def formula(cls, x: Tensor, domain: Tensor, tail_slopes: Tensor, *parameters: Tensor) -> Tensor:
        """f(x) in plain operations: the reference for the kernels, and the form that exporters see."""
        dtype = cls.compute_dtype(x)
        tensors = broadcasting(*(t.to(dtype) for t in (x, domain, tail_slopes, *parameters)))
        return joined(formula.value(cls.series, *tensors), domain).to(x.dtype)

    def derivative(self, x: Tensor) -> Tensor:
        """f'(x) in closed form: S' on [lo, hi], s_lo below, s_hi above. Same shape and dtype as ``x``."""
        dtype = self.compute_dtype(x)
        tensors = broadcasting(*(t.to(dtype) for t in (x, *self._tensors())))
        return joined(formula.slope(self.series_derivative, *tensors), self.domain).to(x.dtype)

    def _tensors(self) -> list[Tensor]:
        """The domain, the tail slopes and the parameters of the series."""
        stored: dict = {**self._parameters, **self._buffers}  # nn.Module's attribute lookup takes a microsecond each
        return [stored[name] if name in stored else getattr(self, name) for name in self._names]

    @torch.no_grad()
    def whole(self) -> LearnableActivation:
        """A copy on the CPU, with all values also if the parameters are sharded over processes (FSDP2, tensor
        parallelism, DeepSpeed ZeRO-3). Then all processes must call it."""
        copied = type(self)(self.degree, init=self.init, groups=self.groups)
        with gathered(self._tensors()):
            for name, value in zip(self._names, self._tensors(), strict=True):
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                getattr(copied, name).data = value.to("cpu", torch.promote_types(value.dtype, torch.float32), copy=True)
        return copied.train(self.training)

    @torch.no_grad()
    def members(self) -> list[LearnableActivation]:
        """The function of each group, as a new activation without groups; only itself without groups.

        Raises:
            ProcessError: this process holds only a part of the parameters.
        """
        if self.groups == 1:
            return [self]
        self.check_present()
        found = [type(self)(self.degree, init=self.init) for _ in range(self.groups)]
        for name, value in zip(self._names, self._tensors(), strict=True):
            rows = value.expand(self.groups, 2) if name == "tail_slopes" else value
            for member, row in zip(found, rows, strict=True):
                getattr(member, name).data = row.detach().clone()
        return found

    @torch.no_grad()
    def set_members(self, members: Sequence[LearnableActivation]) -> None:
        """The inverse of ``members``."""
        for name, stored in zip(self._names, self._tensors(), strict=True):
            rows = [getattr(member, name) for member in members]
            stored.copy_(rows[0] if self.groups == 1 or name == "tail_slopes" else torch.stack(rows))
        self._initialized = True

    def check_present(self) -> None:
        """Raise ProcessError if this process holds only a part of the parameters."""
        if any(map(is_partitioned, self._tensors())):
            raise ProcessError(
                f"{self.name}: DeepSpeed ZeRO-3 spreads its parameters over the processes; use a copy from whole(), "
                "called in all of them"
            )

    def gain(self, sigma: float = 1.0) -> tuple[float, float]:
        """(E[f(x)^2], E[f'(x)^2]) for x ~ N(0, sigma^2), by float64 quadrature (arXiv 2502.01247, section 3); averages
        over the groups."""
        if not sigma > 0:
            raise FitError(f"sigma {sigma!r}: must be a positive standard deviation")
        self.check_present()

        moments = []
        for member in self.members():
            value, slope = (functools.partial(member.evaluate, fn) for fn in (member.forward, member.derivative))
            moments.append(gaussian_moments(value, slope, sigma, member.breaks()))
        second, of_slope = np.mean(moments, axis=0).tolist()
        return second, of_slope

    def fit(
        self,
        fn: Function | Sequence[Function],
        *,
        histogram: Density | None = None,
        domain: tuple[float, float] | None = None,
        derivative_weight: float | None = None,
        tails: bool = True,
        name: str | None = None,
    ) -> FitReport:
        r"""Fit the activation to ``fn``, in place, by weighted least squares in float64:

            min  sum_i w_i [ (f - g)^2 + derivative_weight * (f' - g')^2 ](x_i)

        The nodes x_i are the data and points on the real line. The weights on the line, found by Lawson's iteration,
        make the largest error s anywhere small too: relative to the weighted mean squared error over the data, s^2 has
        weight 0.005, or 0.0002 if the data have Fisher weights.

        Args:
            fn: a name in ``ACT2FN``, an element-wise torch callable, or a module; with groups also a list of one per
                group, with the same slopes far out.
            histogram: ``conversion.Histogram`` of pre-activations for the weights: the importance of each bin, or its
                count. If it has groups, each group of the activation is fitted to its own; without, to that of the
                layer. Without a histogram, the weight is the density of N(-0.5, 1.5^2).
            domain: the interval [lo, hi]; None to search for it, in each group.
            derivative_weight: lambda >= 0; by default 0.03, or 0 for the piecewise-linear families.
            tails: False for the pure series on the whole real line. It is fitted on ``domain``, by default the range
                of the data of all groups. All data must lie in it; outside, the series is wrong.
            name: the name of ``fn`` in the report.

        Raises:
            FitError: ``fn`` cannot be fitted, or an argument is out of range; the module is unchanged.

        Example:
            >>> activation = hf_ortho.activations.Hermite(8)
            >>> report = activation.fit("gelu")
            >>> report.sup_error < 0.01
            True
        """
        weight = self.default_derivative_weight if derivative_weight is None else derivative_weight
        return fit(self, *targets_of(self, fn, histogram, FitOptions(weight, domain, tails), name))

    def measure(
        self,
        fn: Function | Sequence[Function],
        *,
        histogram: Density | None = None,
        domain: tuple[float, float] | None = None,
        name: str | None = None,
    ) -> FitReport:
        """The errors of f against ``fn``, as ``fit`` reports them; ``domain`` is for a fit without tails.

        Raises:
            FitError: ``fn`` is unknown, or has no straight asymptotes.
        """
        return report_of(self, targets_of(self, fn, histogram, FitOptions(domain=domain), name, domain)[1])

    @torch.no_grad()
    def evaluate(self, fn: Callable[[Tensor], Tensor], x: np.ndarray) -> np.ndarray:
        """``forward`` or ``derivative`` at float64 points. On the CPU: some devices have no float64."""
        if self.domain.device.type != "cpu":
            fn = getattr(copy.deepcopy(self).cpu(), fn.__name__)
        return fn(torch.as_tensor(x, dtype=torch.float64)).numpy()

    @classmethod
    def compute_dtype(cls, x: Tensor) -> torch.dtype:
        """The dtype of the arithmetic: at least float32.

        Raises:
            TypeError: ``x`` is not a floating-point tensor.
        """
        if not x.dtype.is_floating_point:
            raise TypeError(f"{cls.family} takes floating-point tensors, got {x.dtype}")
        return torch.promote_types(x.dtype, torch.float32)

    def extra_repr(self) -> str:
        shape = f"degree={self.degree}" + (f", groups={self.groups}" if self.groups > 1 else "")
        if self.domain.is_meta or is_partitioned(self.domain):
            return shape
        (lo, hi), (s_lo, s_hi) = self.domain.unbind(-1), self.tail_slopes.tolist()
        domain = "domain=" if self.groups == 1 else "domains within "
        return f"{shape}, {domain}[{lo.min():.4g}, {hi.max():.4g}], tail_slopes=[{s_lo:.4g}, {s_hi:.4g}]"

    # ---- initialization, also through from_pretrained --------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Reset all tensors to their initial values."""
        self._write_initial_values(lambda stored, value: stored.copy_(value))

    @torch.no_grad()
    def _write_initial_values(self, copy) -> None:
        for key, values in self._initial.items():
            stored = getattr(self, key)
            value = torch.tensor(values, dtype=stored.dtype, device=stored.device).expand(stored.shape)
            if hasattr(stored, "placements"):  # a DTensor, under FSDP2 or tensor parallelism
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, stored.device_mesh, stored.placements)
            copy(stored, value)
        for name in SHARED:  # transformers makes all that it loads trainable
            getattr(self, name).requires_grad_(False)
        self._initialized = True

    @property
    def _is_hf_initialized(self) -> bool:
        # PreTrainedModel._initialize_weights reads this flag of every module after the checkpoint is loaded. There is
        # no other hook for classes unknown to the model: missing keys would remain uninitialized memory.
        if not self._initialized and not self.domain.is_meta:
            if not all(getattr(getattr(self, key), "_is_hf_initialized", False) for key in self._initial):
                logger.warning_once(
                    f"The checkpoint has no parameters for the activation {self.name}: it starts from the "
                    f"{self.init!r} initialization, which is not a fit to the activation the model was trained with. "
                    "To convert a pretrained model use hf_ortho.convert(model, ...) or `hf-ortho convert`."
                )
            self._write_initial_values(initialization.copy_)  # leaves loaded tensors alone
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        pass

    def _apply(self, fn, recurse=True):
        def keep_precision(tensor):
            moved = fn(tensor)
            if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
                moved = tensor.to(moved.device, torch.float32)
            return moved

        was_meta = self.domain.is_meta
        super()._apply(keep_precision, recurse)
        if was_meta and not self.domain.is_meta:  # to_empty()
            self.reset_parameters()
        return self
