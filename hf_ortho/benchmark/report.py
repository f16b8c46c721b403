"""The results of a benchmark as tables."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..text import digits, some
from .results import BenchResults, Figure
from .run import Section
from .settings import Settings
from .targets import Outcome, floor_of

# standalone activations: memory per element
PER_ELEMENT = ("sequence", "image", "libraries", "elements", "degree", "groups")
MOVED = {"forward": 2, "forward + backward": 5}  # tensors read and written
MEMORY = ("saved", "kept", "peak")
RATIOS = ("sequence", "image", "libraries", "degree")  # tables of ratios alone, all to one row
TITLES = {
    "sequence": "activations on {sequence}",
    "image": "activations on {image}",
    "libraries": "other libraries, on {libraries}",
    "elements": "over the number of elements: ratios to F.gelu of the same size",
    "degree": "over the degree, on {degree_elements} elements",
    "groups": "groups of channels: ratios to the same activation without",
    "decode": "host time of one call on {decode}, without and with gradient",
    "gpt2": "{gpt2}: training step on {gpt2_batch}, no optimizer",
    "gpt2_eager": "{gpt2}: training step on {gpt2_batch}, with AdamW",
    "gpt2_compiled": "{gpt2}, compiled: step on {gpt2_batch}, with AdamW",
    "convnext": "{convnext}: training step on {convnext_batch}, no optimizer",
    "generation": "{gpt2}: {tokens} tokens with transformers, greedy, with cache",
    "vllm": "{gpt2}: {tokens} tokens with vLLM, greedy, wall time",
}

Table = tuple[str, list[str], list[list[str]]]


def explanation(settings: Settings) -> str:
    """Explain the measurements and the columns."""
    clock, memory, gpu = "CPU time of one thread", "the process's resident set", ""
    if settings.device == "cuda":
        clock, memory = "GPU time", "torch's CUDA allocator"
        gpu = "Without launches; for models, wall time. Activations take turns over inputs that\n"
        gpu += "exceed the L2 cache 4 times. Training is in mixed precision.\n"
    return (
        f"{settings.device}, {settings.to_dict()['dtype']}, x ~ N(0, 1), seed {settings.seed}, "
        f"up to {settings.rounds} rounds, {clock}.\n{gpu}"
        "A figure is the ratio to the first row of its table, such as F.gelu: 2.00 takes\n"
        "twice the time or memory. It is the median over the rounds, ± half the\n"
        "interquartile range. + backward: forward and backward; saved: tensors saved for\n"
        "backward, over the size of x; kept: memory held between forward and backward;\n"
        f"peak: the maximum during both, without inputs and weights, in\n{memory}."
    )


def plan(sections: Mapping[str, Section], left_out: Iterable[str], budget: float) -> list[str]:
    """The sections with their expected durations, and those that the budget has no time for."""
    total = sum(section.seconds for section in sections.values())
    named = ", ".join(f"{name} {section.seconds:.0f} s" for name, section in sections.items())
    lines = [f"Sections: {named or 'none'}; about {_minutes(total)} in all"]
    names = ", ".join(left_out)
    if names:
        lines.append(f"Left out to stay within {budget:g} s: {names}")
    elif total > 120:
        lines.append("For less: --sections NAME ..., or --budget SECONDS for the most important")
    return lines


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds <= 120 else f"{seconds / 60:.0f} min"


def case_table(results: BenchResults, case: str, settings: Settings) -> Table:
    """Title, columns and rows of one case. The floors only serve the targets."""
    by_row = {name: row for name, row in results.of(case).items() if not name.startswith(floor_of(""))}
    measures = list(dict.fromkeys(measure for row in by_row.values() for measure in row))
    columns = [""]
    for measure in measures:
        columns += [short(measure), *([_unit(case, measure)] if _with_values(case, measure) else [])]
    rows = [[name, *(cell for m in measures for cell in _cells(case, m, row.get(m)))] for name, row in by_row.items()]
    return TITLES[case].format_map(_sizes(settings)), columns, rows


def reference(results: BenchResults, case: str) -> list[str]:
    """The figures of the first row, in one line, for a table of ratios alone."""
    if case not in RATIOS or not results.of(case):
        return []
    name, figures = next(iter(results.of(case).items()))
    values = [f"{short(m)} {_value(case, f)} {_unit(case, m)}" for m, f in figures.items() if m != "saved"]
    return [f"1.00 is {name}: {', '.join(values)}"]


def short(text: str) -> str:
    """The name of a measure, for a column."""
    return re.sub(r"[\w]+ \+ backward", "+ backward", text)


def _sizes(settings: Settings) -> dict[str, Any]:
    """The settings, with the models and their batches in words."""
    gpt2, (sequences, length) = settings.gpt2, settings.gpt2_batch
    depths, side = "-".join(map(str, settings.convnext["depths"])), settings.convnext["image_size"]
    shapes = {name: getattr(settings, name) for name in ("sequence", "image", "libraries", "decode")}
    sizes = settings.to_dict() | {name: " x ".join(map(str, shape)) for name, shape in shapes.items()}
    return sizes | {
        "gpt2": f"GPT-2, {gpt2['n_layer']} layers of width {gpt2['n_embd']}",
        "gpt2_batch": f"{sequences} x {length} tokens",
        "convnext": f"ConvNeXt, depths {depths}",
        "convnext_batch": f"{settings.convnext_batch} images of {side} x {side}",
    }


def _unit(case: str, measure: str) -> str:
    if measure in MEMORY:
        return "B/elem" if case in PER_ELEMENT else "MB"
    if measure == "speed":
        return "tokens/s" if case in ("generation", "vllm") else "ktokens/s"
    return "us" if measure.startswith("call") else "ms"


def _with_values(case: str, measure: str) -> bool:
    """Whether the table has the values beside the ratios."""
    return case not in RATIOS and not (case in PER_ELEMENT and measure in MEMORY)


def _cells(case: str, measure: str, figure: Figure | None) -> list[str]:
    values = _with_values(case, measure)
    if figure is None:
        return ["-", "-"] if values else ["-"]
    spread = "" if figure.spread is None else f" ± {figure.spread / 2:.2f}"
    return [f"{figure.ratio:.2f}{spread}", *([_value(case, figure)] if values else [])]


def _value(case: str, figure: Figure) -> str:
    units = {"us": 1e6, "ms": 1e3, "MB": 1e-6, "B/elem": 1.0, "tokens/s": 1.0, "ktokens/s": 1e-3}
    return digits(figure.value * units[_unit(case, figure.measure)])


def has_bandwidth(results: BenchResults, case: str) -> bool:
    return all(results.find(case, "copy", measure) for measure in MOVED)


def bandwidth_table(results: BenchResults, case: str, settings: Settings) -> Table:
    """The bandwidth of each row: the bytes that any activation must move over its time, and the share of the copy's.

    Forward reads x and writes y; with backward, x and the gradient are read and a gradient is written too.
    """
    size = math.prod(getattr(settings, case)) * settings.dtype.itemsize
    copy = results.of(case)["copy"]
    rows = []
    for name, figures in results.of(case).items():
        if name.startswith(floor_of("")):
            continue
        cells = []
        for measure, tensors in MOVED.items():
            seconds = figures[measure].value
            cells += [f"{tensors * size / seconds / 1e9:.4g}", f"{copy[measure].value / seconds:.0%}"]
        rows.append([name, *cells])
    columns = ["", *(cell for measure in MOVED for cell in (f"{short(measure)}, GB/s", "of copy"))]
    return f"bandwidth on {_sizes(settings)[case]}, read and written", columns, rows


def not_run(results: BenchResults, case: str) -> list[str]:
    """One line per reason for the competitors that failed or were not run."""
    reasons: dict[tuple[str, bool], list[str]] = {}
    for entry in results.not_run:
        if entry.case == case:
            reasons.setdefault((entry.reason, entry.failed), []).append(entry.row or case)
    return [
        f"{some(rows)}: {'failed: ' if failed else ''}{reason}{'' if failed else ', not run'}"
        for (reason, failed), rows in reasons.items()
    ]


def targets_table(outcomes: Iterable[Outcome]) -> Table:
    """The targets, with the measured ratios."""
    rows = []
    for outcome in outcomes:
        measured = "-" if outcome.figure is None else f"{outcome.figure.ratio:.2f}"
        limit = f"{outcome.target.limit:.3g}" if outcome.floor is None else f"{outcome.floor.ratio:.2f}*"
        verdict = outcome.verdict.partition(",")[0]
        rows.append([short(str(outcome.target)), limit, measured, verdict])
    title = "Targets: ratios and their limits (*: a measured floor, above the target)"
    return title, ["", "limit", "ratio", ""], rows


def sentences(outcomes: Iterable[Outcome]) -> list[str]:
    """One line for each target that is missed, and one for all that were not run."""
    outcomes = list(outcomes)
    lines = [
        f"missed: {o.target}: target {o.target.limit:.3g}, measured {o.figure.ratio:.2f}, {o.verdict}"
        for o in outcomes
        if o.figure is not None
    ]
    absent = Counter(o.target.case for o in outcomes if o.figure is None)
    named = ", ".join(f"{number} of {case}" for case, number in absent.items())
    return [*lines, f"targets that were not run: {named}"] if absent else lines
