"""The results of a benchmark as tables."""

from __future__ import annotations

from collections.abc import Iterable

from .results import BenchResults, Figure
from .settings import Settings
from .targets import Outcome

PER_ELEMENT = ("sequence", "image", "libraries", "elements", "degree")  # standalone activations: memory per element
MEMORY = ("saved", "kept", "peak")
TITLES = {
    "sequence": "activations on {sequence}",
    "image": "activations on {image}",
    "libraries": "other libraries, on {libraries}",
    "elements": "over the number of elements",
    "degree": "over the degree, {degree_elements} elements",
    "decode": "one call on {decode}, without gradient",
    "gpt2": "training step of GPT-2 ({gpt2}, batch {gpt2_batch}), no dropout, no optimizer",
    "convnext": "training step of ConvNeXt ({convnext}, {convnext_batch} images), no optimizer",
    "generation": "GPT-2, {tokens} tokens, greedy, with cache",
}

Table = tuple[str, list[str], list[list[str]]]


def explanation(settings: Settings) -> str:
    """Explain the measurements and the columns."""
    clock, memory = "CPU time, one thread", "the process's resident set"
    if settings.device == "cuda":
        clock, memory = "CUDA events", "torch's CUDA allocator"
    return (
        f"{settings.device}, {settings.to_dict()['dtype']}, x ~ N(0, 1), seed {settings.seed}, {clock}, up to "
        f"{settings.rounds} interleaved rounds.\n"
        "A ratio is to the first row in the same round: median over the rounds ± half the interquartile range.\n"
        "saved: tensors saved for backward, over the size of x; kept: memory held between forward and backward;\n"
        f"peak: maximum during forward and backward. kept and peak exclude inputs and weights, in {memory}."
    )


def case_table(results: BenchResults, case: str, settings: Settings) -> Table:
    """Title, columns and rows of one case."""
    by_row = results.of(case)
    measures = list(dict.fromkeys(measure for row in by_row.values() for measure in row))
    columns = [""]
    for measure in measures:
        columns += [measure, _unit(case, measure)]
    rows = [[name, *(cell for m in measures for cell in _cells(case, row.get(m)))] for name, row in by_row.items()]
    return TITLES[case].format_map(settings.to_dict()), columns, rows


def _unit(case: str, measure: str) -> str:
    if measure in MEMORY:
        return "B/elem" if case in PER_ELEMENT else "MB"
    return "us" if measure == "call" else "ms"


def _cells(case: str, figure: Figure | None) -> tuple[str, str]:
    if figure is None:
        return "-", "-"
    unit = {"us": 1e6, "ms": 1e3, "MB": 1e-6, "B/elem": 1.0}[_unit(case, figure.measure)]
    spread = "" if figure.spread is None else f" ± {figure.spread / 2:.2f}"
    return f"{figure.ratio:.2f}{spread}", f"{figure.value * unit:.4g}"


def bandwidth(results: BenchResults, case: str, settings: Settings) -> float:
    """Bandwidth of the copy, read and written, in bytes per second."""
    figure = results.find(case, "copy", "forward")
    assert figure is not None
    elements = 1
    for size in getattr(settings, case):
        elements *= size
    return 2 * elements * settings.dtype.itemsize / figure.value


def not_run(results: BenchResults, case: str) -> list[str]:
    """One line per reason for the competitors that were not run."""
    reasons: dict[str, list[str]] = {}
    for entry in results.not_run:
        if entry.case == case:
            reasons.setdefault(entry.reason, []).append(entry.row)
    return [f"{', '.join(rows)}: {reason}, not run" for reason, rows in reasons.items()]


def targets_table(outcomes: Iterable[Outcome]) -> Table:
    """All targets of the device, with the measured ratios."""
    rows = []
    for outcome in outcomes:
        target, figure = outcome.target, outcome.figure
        measured = "-" if figure is None else f"{figure.ratio:.2f}"
        name = f"{target.case}: {target.row}, {target.measure}"
        rows.append([name, f"<= {target.limit:g}", measured, outcome.verdict])
    return "targets, as ratios", ["", "target", "measured", ""], rows


def sentence(outcome: Outcome) -> str:
    """A target and its measured ratio, in one line."""
    target, figure = outcome.target, outcome.figure
    measured = "nothing" if figure is None else f"{figure.ratio:.2f}"
    what = f"{target.case}: {target.row}, {target.measure}"
    return f"{what}: target {target.limit:g}, measured {measured}, {outcome.verdict}"
