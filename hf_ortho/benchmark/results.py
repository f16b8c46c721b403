"""The figures of a benchmark."""

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
        case: what was run, for example ``sequence`` or ``gpt2``.
        row: the competitor.
        measure: ``forward``, ``forward + backward``, ``call``, ``step`` or ``generate``, which are times; ``saved``
            for backward, ``kept`` between forward and backward, or ``peak``, which are memory.
        value: median seconds, or bytes; in the cases of a single activation bytes per element.
        ratio: to the case's first row; of ``saved`` in those cases: bytes over the bytes of the input.
        spread: interquartile range of the ratio over the rounds; None for memory.
    """

    case: str
    row: str
    measure: str
    value: float
    ratio: float
    spread: float | None = None


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A competitor that was left out of a case, and why."""

    case: str
    row: str
    reason: str


@dataclasses.dataclass
class Results:
    """All figures, in the order in which they were measured."""

    figures: list[Figure] = dataclasses.field(default_factory=list)
    not_run: list[NotRun] = dataclasses.field(default_factory=list)

    def find(self, case: str, row: str, measure: str) -> Figure | None:
        return next((f for f in self.figures if (f.case, f.row, f.measure) == (case, row, measure)), None)

    def of(self, case: str) -> dict[str, dict[str, Figure]]:
        """row -> measure -> figure."""
        rows: dict[str, dict[str, Figure]] = {}
        for figure in self.figures:
            if figure.case == case:
                rows.setdefault(figure.row, {})[figure.measure] = figure
        return rows

    def add_times(self, case: str, measure: str, times: Mapping[str, Times]) -> None:
        for row, found in times.items():
            self.figures.append(Figure(case, row, measure, found.median, found.ratio, found.spread))

    def add_memory(self, case: str, measure: str, values: Mapping[str, float], unit: float | None = None) -> None:
        """``unit`` is what a ratio of 1 means; by default the value of the first row. Nothing is added if it is not
        positive, as the resident set's growth may be for small tensors."""
        unit = unit or next(iter(values.values()), 0.0)
        if unit > 0:
            self.figures += [Figure(case, row, measure, value, value / unit) for row, value in values.items()]
