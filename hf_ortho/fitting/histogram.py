"""A streamed histogram of pre-activations: constant memory, on the device of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, WidthError
from ..kernels.groups import check_width
from ..processes import max_over_processes, sum_over_processes
from .density import LINE, PRE_ACTIVATIONS
from .nodes import Nodes
from .source import Source

BINS, MOST_GROUPS = 1024, 1024  # with more groups, a quarter of the bins, for less memory
LANES = 64  # partial sums per bin: fewer rounding errors in float32, and less contention on a GPU
PRIOR = 32  # values of the whole layer that each group has besides its own; more blur a fit of high degree
ASINH_RANGE = math.asinh(2.0**16)


class Histogram:
    """Counts of x in 1024 bins, uniform in asinh(x): 0.023 wide around 0, 2.3 % of |x| in the tails.

    Uses constant memory, on the device of the data. ``minimum`` and ``maximum`` are exact. With ``weigh``, each bin
    also has an importance, which replaces the count as the weight of a fit.

    All attributes are those of all data. With N ``groups``, the last dimension of the data is split into N groups of
    consecutive channels, and ``by_group`` gives the data of each. With more than 1024 groups there are 256 bins.

    Example:
        >>> histogram = hf_ortho.Histogram()
        >>> histogram.update(torch.tensor([[-2.0, 0.5], [1.0, 3.0]]))
        >>> histogram.minimum, histogram.maximum, int(histogram.counts.sum())
        (-2.0, 3.0, 4)
    """

    def __init__(self, groups: int = 1):
        if not isinstance(groups, int) or groups < 1:
            raise WidthError(f"groups {groups!r} of a histogram: must be a positive integer")
        self.groups = groups
        self._bins = BINS if groups <= MOST_GROUPS else BINS // 4
        self._counts: Tensor | None = None
        self._extremes: Tensor | None = None  # -minimum and maximum of each group
        self._importance: Tensor | None = None
        self._scale = 1.0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count all elements of ``x``, any shape and floating dtype.

        Raises:
            WidthError: the last dimension is not a multiple of ``groups``.
        """
        if not x.numel():
            return
        rows = self._rows(x.detach()).float()
        counts = torch.zeros(self.groups * self._bins, dtype=torch.int64, device=x.device)
        for piece in rows.split(max(1, 2**24 // rows.shape[1])):  # for less memory
            # not histc: it is not deterministic on a GPU, and raises if torch.use_deterministic_algorithms is set
            counts += torch.bincount(self._cells(piece), minlength=len(counts))
        by_group = rows.unflatten(1, (self.groups, -1))
        self._combine(counts, torch.stack([-by_group.amin((0, 2)), by_group.amax((0, 2))]))

    @torch.no_grad()
    def weigh(self, x: Tensor, gradient: Tensor) -> None:
        """Add the squares of ``gradient`` to the importance of the bins of ``x``, both of the same shape."""
        if not x.numel():
            return
        rows, gradients = self._rows(x), self._rows(gradient)
        lanes = max(1, LANES // self.groups)
        importance = torch.zeros(self.groups * self._bins * lanes, device=x.device)
        most = max(1, 2**22 // rows.shape[1])
        for piece, g in zip(rows.split(most), gradients.split(most), strict=True):
            lane = torch.arange(piece.numel(), dtype=torch.int32, device=x.device).remainder_(lanes)
            cells = self._cells(piece.float()).mul_(lanes).add_(lane)
            importance.index_add_(0, cells, g.flatten().float().square())
        self._importance = _sum(self._importance, importance.view(-1, lanes).sum(1))

    def _rows(self, x: Tensor) -> Tensor:
        """``x`` with its channels in the second of two dimensions; without groups, their number does not matter."""
        if self.groups == 1:
            return x.reshape(-1, 1)
        check_width(x, self.groups)
        return x.reshape(-1, x.shape[-1])

    def _cells(self, rows: Tensor) -> Tensor:
        """The bin of each element of float32 ``rows``, in a table of the bins of all groups."""
        bins = _bins(rows.flatten(), self._bins).view(len(rows), self.groups, -1)
        first = torch.arange(0, self.groups * self._bins, self._bins, dtype=torch.int32, device=rows.device)
        return bins.add_(first[:, None]).flatten()

    def by_group(self) -> list[Histogram]:
        """The data of each group, mixed with ``PRIOR`` values distributed as those of all groups. ``minimum`` and
        ``maximum`` are those of its own data.

        Example:
            >>> histogram = hf_ortho.Histogram(groups=2)
            >>> histogram.update(torch.tensor([[-2.0, 0.5], [1.0, 3.0]]))
            >>> [part.minimum for part in histogram.by_group()], histogram.minimum
            ([-2.0, 0.5], -2.0)
        """
        # All groups see the same number n of values. Let p = PRIOR / (PRIOR + n). The mixture is 1 - p times the own
        # table plus p times the mean over all groups, for counts and importance alike: the sum over the groups is the
        # table of the layer, and the divergences of the groups add up to the one of the layer.
        if self.groups == 1:
            return [self]
        prior = PRIOR / (PRIOR + float(self.counts.sum()) / self.groups)

        def mixed(table: Tensor | None) -> Sequence[Tensor | None]:
            if table is None:
                return [None] * self.groups
            own = table.view(self.groups, -1).cpu().double()
            return list((1 - prior) * own + prior * own.mean(0))

        extremes = [None] * self.groups if self._extremes is None else self._extremes.cpu().split(1, dim=1)
        parts = [Histogram() for _ in range(self.groups)]
        for part, *data in zip(parts, mixed(self._counts), extremes, mixed(self._importance), strict=True):
            part._bins, part._scale = self._bins, self._scale
            part._counts, part._extremes, part._importance = data
        return parts

    def add(self, other: Histogram) -> None:
        """Add all that ``other`` has seen; both with the same scale, unless nothing was seen before."""
        if self._counts is None:
            self._scale = other._scale
        if other._counts is not None and other._extremes is not None:
            self._combine(other._counts, other._extremes)
        if other._importance is not None:
            self._importance = _sum(self._importance, other._importance)

    def scale(self, factor: float) -> None:
        """Multiply ``importance`` by ``factor``."""
        self._scale *= factor

    def _combine(self, counts: Tensor, extremes: Tensor) -> None:
        self._counts = _sum(self._counts, counts)
        if self._extremes is not None:  # torch.maximum propagates NaN, for ``check``
            extremes = torch.maximum(self._extremes, extremes.to(self._extremes.device))
        self._extremes = extremes

    def reduce(self, device: torch.device) -> None:
        """Sum the counts and the importance, and combine the extremes, over all processes of ``torch.distributed``."""
        counts = torch.zeros(self.groups * self._bins, dtype=torch.int64, device=device)
        importance = torch.zeros(self.groups * self._bins, device=device)
        extremes = torch.full((2, self.groups), -math.inf, device=device)
        if self._counts is not None and self._extremes is not None:
            counts, extremes = self._counts.to(device), self._extremes.to(device)
        if self._importance is not None:
            importance = self._importance.to(device)
        # a maximum over processes need not propagate NaN, so infinity replaces it
        extremes = torch.nan_to_num(extremes, nan=math.inf, posinf=math.inf, neginf=-math.inf)
        counts, extremes = sum_over_processes(counts), max_over_processes(extremes)
        importance = sum_over_processes(importance)
        if counts.any():
            self._counts, self._extremes, self._importance = counts, extremes, importance

    def check(self, where: str) -> None:
        """Raise CalibrationError if a NaN or an infinity was seen."""
        if self._extremes is not None and not torch.isfinite(self._extremes).all():
            raise CalibrationError(
                f"{self} of {where} are not finite (min {self.minimum:g}, max {self.maximum:g}): the "
                "calibration data or the weights contain NaN or infinity"
            )

    def _of_all(self, table: Tensor) -> np.ndarray:
        return table.view(self.groups, -1).cpu().double().sum(0).numpy()

    @property
    def counts(self) -> np.ndarray:
        return np.zeros(self._bins) if self._counts is None else self._of_all(self._counts)

    @property
    def minimum(self) -> float:
        return math.nan if self._extremes is None else -float(self._extremes[0].amax())

    @property
    def maximum(self) -> float:
        return math.nan if self._extremes is None else float(self._extremes[1].amax())

    @property
    def edges(self) -> np.ndarray:
        """The edges of the bins, one more than bins, in units of x."""
        return np.sinh(np.linspace(-ASINH_RANGE, ASINH_RANGE, self._bins + 1))

    @property
    def importance(self) -> np.ndarray | None:
        """The importance of each bin; None if nothing was weighed, or the sums are 0 or not finite."""
        if self._importance is None:
            return None
        importance = self._of_all(self._importance) * self._scale
        return importance if 0 < importance.sum() < math.inf else None

    def nodes(self, source: Source, within: tuple[float, float] | None = None) -> Nodes:
        """Bin centers as fit nodes, weighted by the importance or the counts; see ``Density``."""
        edges = np.linspace(-ASINH_RANGE, ASINH_RANGE, self._bins + 1)
        middle = (edges[1:] + edges[:-1]) / 2
        ends = np.clip(np.arcsinh([self.minimum, self.maximum]), -ASINH_RANGE, ASINH_RANGE)
        beyond = np.abs(np.clip(middle, *ends) - middle) > edges[1] - edges[0]  # only values of other groups
        centers = np.where(beyond, np.sinh(middle), np.clip(np.sinh(middle), self.minimum, self.maximum))
        lo, hi = within or (-math.inf, math.inf)
        share = np.where((centers >= lo) & (centers <= hi), self.counts, 0.0)
        return Nodes.of(source, centers, share, within or LINE, self.importance, self.minimum, self.maximum)

    def __str__(self) -> str:
        return PRE_ACTIVATIONS


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more.to(total.device)


def _bins(x: Tensor, count: int) -> Tensor:
    """Which of ``count`` bins each element of a float32 vector is in, int32; NaN in the first."""
    size = x.abs()
    # asinh |x|, three times as fast as torch.asinh on a CPU; |x| above 2^64 ends in the last bin
    position = size.square().add_(1).sqrt_().add_(size).log_().copysign_(x)
    bins = position.add_(ASINH_RANGE).mul_(count / (2 * ASINH_RANGE)).clamp_(0, count - 1)
    return bins.nan_to_num_(0.0).int()
