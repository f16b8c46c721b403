"""A streamed histogram of pre-activations: constant memory, on the device of the data."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, WidthError
from ..kernels.groups import check_width
from ..processes import max_over_processes, sum_over_processes
from .density import LINE, PRE_ACTIVATIONS
from .nodes import Nodes
from .source import Source

BINS = 1024
LANES = 64  # partial sums per bin: fewer rounding errors in float32, and less contention on a GPU
CELLS = 2**20  # most bins of all groups together
PRIOR = 32  # values of the whole layer that each group has besides its own; more blur a fit of high degree
ASINH_RANGE = math.asinh(2.0**16)


class Histogram:
    """Counts of x in 1024 bins, uniform in asinh(x): 0.023 wide around 0, 2.3 % of |x| in the tails.

    Uses constant memory, on the device of the data. ``minimum`` and ``maximum`` are exact. With ``weigh``, each bin
    also has an importance, which replaces the count as the weight of a fit.

    All attributes are those of all data. With N ``groups``, the last dimension of the data is split into N groups of
    consecutive channels, and ``group`` gives the data of each.

    Example:
        >>> histogram = hf_ortho.Histogram()
        >>> histogram.update(torch.tensor([[-2.0, 0.5], [1.0, 3.0]]))
        >>> histogram.minimum, histogram.maximum, int(histogram.counts.sum())
        (-2.0, 3.0, 4)
    """

    def __init__(self, groups: int = 1):
        if not isinstance(groups, int) or not 1 <= groups <= CELLS:
            raise WidthError(f"groups {groups!r} of a histogram: must be an integer from 1 to {CELLS}")
        self.groups = groups
        # Beyond 1024 groups, several bins are one cell of a group. Tables of all data and of the groups, flat:
        self._each = 2 ** (min(BINS, CELLS // groups).bit_length() - 1)
        self._sizes = [BINS] if groups == 1 else [BINS, groups * self._each]
        self._counts: Tensor | None = None
        self._extremes: Tensor | None = None
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
        counts = torch.zeros(sum(self._sizes), dtype=torch.int64, device=x.device)
        for piece in rows.split(max(1, 2**24 // rows.shape[1])):  # for less memory
            # not histc: it is not deterministic on a GPU, and raises if torch.use_deterministic_algorithms is set
            tables = zip(self._cells(piece), self._sizes, strict=True)
            counts += torch.cat([torch.bincount(cells, minlength=size) for cells, size in tables])
        by_group = rows.unflatten(1, (self.groups, -1))
        self._combine(counts, torch.stack([by_group.amin((0, 2)), by_group.amax((0, 2))]))

    @torch.no_grad()
    def weigh(self, x: Tensor, gradient: Tensor) -> None:
        """Add the squares of ``gradient`` to the importance of the bins of ``x``, both of the same shape."""
        if not x.numel():
            return
        rows, gradients = self._rows(x), self._rows(gradient)
        lanes = [LANES, max(1, LANES // self.groups)][: len(self._sizes)]
        sums = [torch.zeros(size * n, device=x.device) for size, n in zip(self._sizes, lanes, strict=True)]
        most = max(1, 2**22 // rows.shape[1])
        for piece, g in zip(rows.split(most), gradients.split(most), strict=True):
            square = g.flatten().float().square()
            order = torch.arange(len(square), dtype=torch.int32, device=x.device)
            for table, n, cells in zip(sums, lanes, self._cells(piece.float()), strict=True):
                table.index_add_(0, cells.mul_(n).add_(order.remainder(n)), square)
        importance = torch.cat([table.view(-1, n).sum(1) for table, n in zip(sums, lanes, strict=True)])
        self._importance = (
            importance if self._importance is None else self._importance + importance.to(self._importance)
        )

    def _rows(self, x: Tensor) -> Tensor:
        """``x`` with its channels in the second of two dimensions; without groups, their number does not matter."""
        if self.groups == 1:
            return x.reshape(-1, 1)
        check_width(x, self.groups)
        return x.reshape(-1, x.shape[-1])

    def _cells(self, rows: Tensor) -> list[Tensor]:
        """The cell of each element of float32 ``rows``, in the table of all data and in that of the groups."""
        bins = _bins(rows.flatten())
        if self.groups == 1:
            return [bins]
        first = torch.arange(0, self._sizes[1], self._each, dtype=torch.int32, device=rows.device)
        own = bins.view(len(rows), self.groups, -1) // (BINS // self._each) + first[:, None]
        return [bins, own.flatten()]

    def group(self, i: int) -> Histogram:
        """The data of group ``i``, mixed with ``PRIOR`` values distributed as those of all groups. ``minimum`` and
        ``maximum`` are those of its own data.

        Example:
            >>> histogram = hf_ortho.Histogram(groups=2)
            >>> histogram.update(torch.tensor([[-2.0, 0.5], [1.0, 3.0]]))
            >>> histogram.group(1).minimum, histogram.minimum
            (0.5, -2.0)
        """
        # All groups see the same number n of values. Let p = PRIOR / (PRIOR + n). The mixture is 1 - p times the own
        # table plus p times the mean over all groups, for counts and importance alike: the sum over the groups is the
        # table of the layer, and the divergences of the groups add up to the one of the layer. A cell of several bins
        # is spread over these as in the layer.
        if self.groups == 1:
            return self
        mixed = Histogram()
        if self._counts is None or self._extremes is None:
            return mixed
        count = float(self._counts[:BINS].sum()) / self.groups
        prior = PRIOR / (PRIOR + count)
        mixed._counts, mixed._extremes = self._mixed(self._counts, i, prior), self._extremes[:, i : i + 1].cpu()
        if self._importance is not None:
            mixed._importance, mixed._scale = self._mixed(self._importance, i, prior), self._scale
        return mixed

    def _mixed(self, table: Tensor, i: int, prior: float) -> Tensor:
        layer = table[:BINS].cpu().double()
        own = table[BINS + i * self._each : BINS + (i + 1) * self._each].cpu().double()[:, None]
        fine = layer.view(self._each, -1)
        spread = fine / fine.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return (1 - prior) * (own * spread).flatten() + prior / self.groups * layer

    def add(self, other: Histogram) -> None:
        """Add all that ``other`` has seen; both with the same scale, unless nothing was seen before."""
        if self._counts is None:
            self._scale = other._scale
        if other._counts is not None and other._extremes is not None:
            self._combine(other._counts, other._extremes)
        if other._importance is not None:
            more = other._importance
            self._importance = more if self._importance is None else self._importance + more.to(self._importance)

    def scale(self, factor: float) -> None:
        """Multiply ``importance`` by ``factor``."""
        self._scale *= factor

    def _combine(self, counts: Tensor, extremes: Tensor) -> None:
        if self._counts is None or self._extremes is None:
            self._counts, self._extremes = counts, extremes
        else:
            self._counts = self._counts + counts.to(self._counts.device)
            low, high = extremes.to(self._extremes.device)
            # torch.minimum and maximum propagate NaN, for ``check``
            self._extremes = torch.stack(
                [torch.minimum(self._extremes[0], low), torch.maximum(self._extremes[1], high)]
            )

    def reduce(self, device: torch.device) -> None:
        """Sum the counts and the importance, and combine the extremes, over all processes of ``torch.distributed``."""
        counts = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        importance = torch.zeros(sum(self._sizes), device=device)
        sign = torch.tensor([[-1.0], [1.0]], device=device)
        extremes = -math.inf * sign.expand(2, self.groups)
        if self._counts is not None and self._extremes is not None:
            counts, extremes = self._counts.to(device), self._extremes.to(device)
        if self._importance is not None:
            importance = self._importance.to(device)
        # a maximum over processes need not propagate NaN, so infinity replaces it
        bounds = torch.nan_to_num(extremes * sign, nan=math.inf, posinf=math.inf, neginf=-math.inf)
        counts, bounds = sum_over_processes(counts), max_over_processes(bounds)
        importance = sum_over_processes(importance)
        if counts.any():
            self._counts, self._extremes = counts, bounds * sign
            self._importance = importance

    def check(self, where: str) -> None:
        """Raise CalibrationError if a NaN or an infinity was seen."""
        if self._extremes is not None and not torch.isfinite(self._extremes).all():
            raise CalibrationError(
                f"{self} of {where} are not finite (min {self.minimum:g}, max {self.maximum:g}): the "
                "calibration data or the weights contain NaN or infinity"
            )

    @property
    def counts(self) -> np.ndarray:
        return np.zeros(BINS) if self._counts is None else self._counts[:BINS].cpu().numpy().astype(float)

    @property
    def minimum(self) -> float:
        return math.nan if self._extremes is None else float(self._extremes[0].amin())

    @property
    def maximum(self) -> float:
        return math.nan if self._extremes is None else float(self._extremes[1].amax())

    @property
    def edges(self) -> np.ndarray:
        """The 1025 bin edges, in units of x."""
        return np.sinh(np.linspace(-ASINH_RANGE, ASINH_RANGE, BINS + 1))

    @property
    def importance(self) -> np.ndarray | None:
        """The importance of each bin; None if nothing was weighed, or the sums are 0 or not finite."""
        if self._importance is None:
            return None
        importance = self._importance[:BINS].cpu().numpy().astype(float) * self._scale
        return importance if 0 < importance.sum() < math.inf else None

    def nodes(self, source: Source, within: tuple[float, float] | None = None) -> Nodes:
        """Bin centers as fit nodes, weighted by the importance or the counts; see ``Density``."""
        edges = np.linspace(-ASINH_RANGE, ASINH_RANGE, BINS + 1)
        middle = (edges[1:] + edges[:-1]) / 2
        ends = np.clip(np.arcsinh([self.minimum, self.maximum]), -ASINH_RANGE, ASINH_RANGE)
        beyond = np.abs(np.clip(middle, *ends) - middle) > edges[1] - edges[0]  # only values of other groups
        centers = np.where(beyond, np.sinh(middle), np.clip(np.sinh(middle), self.minimum, self.maximum))
        lo, hi = within or (-math.inf, math.inf)
        share = np.where((centers >= lo) & (centers <= hi), self.counts, 0.0)
        return Nodes.of(source, centers, share, within or LINE, self.importance, self.minimum, self.maximum)

    def __str__(self) -> str:
        return PRE_ACTIVATIONS


def _bins(x: Tensor) -> Tensor:
    """The bin of each element of a float32 vector, int32; NaN in the first."""
    size = x.abs()
    # asinh |x|, three times as fast as torch.asinh on a CPU; |x| above 2^64 ends in the last bin
    position = size.square().add_(1).sqrt_().add_(size).log_().copysign_(x)
    bins = position.add_(ASINH_RANGE).mul_(BINS / (2 * ASINH_RANGE)).clamp_(0, BINS - 1)
    return bins.nan_to_num_(0.0).int()
