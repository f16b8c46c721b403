"""The results of a benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..profiling.timing import Times


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Attributes:
        case: the benchmark, such as ``sequence`` or ``gpt2``.
        row: the competitor.
        measure: a time (``forward``, ``forward + backward``, ``call``, ``call + backward``, ``step`` or ``generate``),
            a ``speed``, or memory (``saved`` for backward, ``kept`` between forward and backward, or ``peak``).
        value: median seconds, tokens per second, or bytes (for standalone activations, bytes per element).
        ratio: ratio to the first row of the case. For ``saved`` of standalone activations: ratio to the bytes of the
            input.
        spread: interquartile range of the ratio over the rounds; None for memory and speed.
    """

    case: str
    row: str
    measure: str
    value: float
    ratio: float
    spread: float | None = None


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A competitor that was not run in a case, and the reason.

    Attributes:
        row: the competitor; empty for the whole case.
        failed: whether it raised an error; otherwise it was left out.
    """

    case: str
    row: str
    reason: str
    failed: bool = False


@dataclasses.dataclass
class BenchResults:
    """All figures, in the order of measurement, and the seconds that each case took.

    Example:
        >>> results = hf_ortho.benchmark.BenchResults()
        >>> results.add_memory("gpt2", "peak", {"gelu": 2e6, "hermite_8": 1e6})
        >>> results.of("gpt2")["hermite_8"]["peak"].ratio
        0.5
    """

    figures: list[Figure] = dataclasses.field(default_factory=list)
    not_run: list[NotRun] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def find(self, case: str, row: str, measure: str) -> Figure | None:
        return next((f for f in self.figures if (f.case, f.row, f.measure) == (case, row, measure)), None)

    def of(self, case: str) -> dict[str, dict[str, Figure]]:
        """The figures of a case: row -> measure -> figure."""
        rows: dict[str, dict[str, Figure]] = {}
        for figure in self.figures:
            if figure.case == case:
                rows.setdefault(figure.row, {})[figure.measure] = figure
        return rows

    def add_times(self, case: str, measure: str, times: Mapping[str, Times]) -> None:
        for row, time in times.items():
            self.figures.append(Figure(case, row, measure, time.median, time.ratio, time.spread))

    def add_speeds(self, case: str, tokens: int, times: Mapping[str, Times]) -> None:
        """Add tokens per second, for calls of ``tokens`` each."""
        for row, time in times.items():
            self.figures.append(Figure(case, row, "speed", tokens / time.median, 1 / time.ratio))

    def add_memory(self, case: str, measure: str, values: Mapping[str, float], unit: float | None = None) -> None:
        """Add memory figures. A ratio of 1 is ``unit`` bytes, by default the value of the first row. If the unit is not
        positive, nothing is added: the growth of the resident set can be zero for small tensors."""
        unit = unit or next(iter(values.values()), 0.0)
        if unit > 0:
            self.figures += [Figure(case, row, measure, value, value / unit) for row, value in values.items()]
