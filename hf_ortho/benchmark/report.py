"""The results of a benchmark as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .results import BenchResults, Figure
from .run import Section
from .settings import Settings
from .targets import Outcome

# standalone activations: memory per element
PER_ELEMENT = ("sequence", "image", "libraries", "elements", "degree", "groups")
MOVED = {"forward": 2, "forward + backward": 5}  # tensors read and written
MEMORY = ("saved", "kept", "peak")
TITLES = {
    "sequence": "activations on {sequence}",
    "image": "activations on {image}",
    "libraries": "other libraries, on {libraries}",
    "elements": "over the number of elements",
    "degree": "over the degree, {degree_elements} elements",
    "groups": "groups of channels, over the same activation without",
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
    clock, memory, cache = "CPU time, one thread", "the process's resident set", ""
    if settings.device == "cuda":
        clock, memory = "time on the GPU without launches (models: wall time)", "torch's CUDA allocator"
        cache = "Activations take turns over inputs that exceed the L2 cache 4 times. Training is in mixed precision.\n"
    return (
        f"{settings.device}, {settings.to_dict()['dtype']}, x ~ N(0, 1), seed {settings.seed}, {clock}, up to "
        f"{settings.rounds} interleaved rounds.\n{cache}"
        "A ratio is to the first row in the same round: median over the rounds ± half the interquartile range.\n"
        "saved: tensors saved for backward, over the size of x; kept: memory held between forward and backward;\n"
        f"peak: maximum during forward and backward. kept and peak exclude inputs and weights, in {memory}."
    )


def plan(sections: Mapping[str, Section], left_out: Iterable[str], budget: float) -> list[str]:
    """The sections with their expected durations, and those that the budget has no time for."""
    total = sum(section.seconds for section in sections.values())
    named = ", ".join(f"{name} {section.seconds:.0f} s" for name, section in sections.items())
    lines = [f"Sections: {named or 'none'}; about {total:.0f} s in all"]
    names = ", ".join(left_out)
    return [*lines, f"Left out to stay within {budget:g} s: {names}"] if names else lines


def case_table(results: BenchResults, case: str, settings: Settings) -> Table:
    """Title, columns and rows of one case."""
    by_row = results.of(case)
    measures = list(dict.fromkeys(measure for row in by_row.values() for measure in row))
    columns = [""]
    for measure in measures:
        columns += [measure, _unit(case, measure)]
    rows = [[name, *(cell for m in measures for cell in _cells(case, row.get(m)))] for name, row in by_row.items()]
    return TITLES[case].format_map(_sizes(settings)), columns, rows


def _sizes(settings: Settings) -> dict[str, Any]:
    """The settings, with the models and their batches in words."""
    gpt2, (sequences, length) = settings.gpt2, settings.gpt2_batch
    depths, side = "-".join(map(str, settings.convnext["depths"])), settings.convnext["image_size"]
    return settings.to_dict() | {
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


def _cells(case: str, figure: Figure | None) -> tuple[str, str]:
    if figure is None:
        return "-", "-"
    units = {"us": 1e6, "ms": 1e3, "MB": 1e-6, "B/elem": 1.0, "tokens/s": 1.0, "ktokens/s": 1e-3}
    value = figure.value * units[_unit(case, figure.measure)]
    spread = "" if figure.spread is None else f" ± {figure.spread / 2:.2f}"
    return f"{figure.ratio:.2f}{spread}", f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


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
        cells = []
        for measure, tensors in MOVED.items():
            seconds = figures[measure].value
            cells += [f"{tensors * size / seconds / 1e9:.4g}", f"{copy[measure].value / seconds:.0%}"]
        rows.append([name, *cells])
    columns = ["", *(cell for measure in MOVED for cell in (f"{measure}, GB/s", "of copy"))]
    return f"bandwidth on {getattr(settings, case)}, read and written", columns, rows


def not_run(results: BenchResults, case: str) -> list[str]:
    """One line per reason for the competitors that failed or were not run."""
    reasons: dict[tuple[str, bool], list[str]] = {}
    for entry in results.not_run:
        if entry.case == case:
            reasons.setdefault((entry.reason, entry.failed), []).append(entry.row or case)
    return [
        f"{', '.join(rows)}: {'failed: ' if failed else ''}{reason}{'' if failed else ', not run'}"
        for (reason, failed), rows in reasons.items()
    ]


def targets_table(outcomes: Iterable[Outcome]) -> Table:
    """The targets, with the measured ratios."""
    rows = []
    for outcome in outcomes:
        measured = "-" if outcome.figure is None else f"{outcome.figure.ratio:.2f}"
        rows.append([str(outcome.target), f"<= {outcome.target.limit:.3g}", measured, outcome.verdict])
    return "targets, as ratios", ["", "target", "measured", ""], rows


def sentence(outcome: Outcome) -> str:
    """A target and its measured ratio, in one line."""
    measured = "nothing" if outcome.figure is None else f"{outcome.figure.ratio:.2f}"
    return f"{outcome.target}: target {outcome.target.limit:.3g}, measured {measured}, {outcome.verdict}"
