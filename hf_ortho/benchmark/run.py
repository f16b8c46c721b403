"""The sections of a benchmark, and which of them fit into a budget of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from . import gpt2_case
from .activation_cases import decode, degree, elements, groups, image, libraries, sequence
from .generation import generation, vllm
from .model_cases import convnext, gpt2
from .results import BenchResults
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the benchmark: its function, and the seconds that it is expected to take."""

    run: Callable[[BenchResults, Settings], None]
    seconds: float


# The most important first. The seconds include the compilation of kernels and models.
SECTIONS: dict[str, dict[str, Section]] = {
    "cpu": {
        "sequence": Section(sequence, 130),
        "decode": Section(decode, 10),
        "gpt2": Section(gpt2, 30),
        "elements": Section(elements, 60),
        "image": Section(image, 180),
        "degree": Section(degree, 15),
        "groups": Section(groups, 180),
        "generation": Section(generation, 10),
        "convnext": Section(convnext, 15),
        "libraries": Section(libraries, 5),
        "vllm": Section(vllm, 180),
    },
    "cuda": {
        "sequence": Section(sequence, 30),
        "decode": Section(decode, 5),
        "gpt2_eager": Section(gpt2_case.eager, 30),
        "gpt2_compiled": Section(gpt2_case.compiled, 60),
        "elements": Section(elements, 15),
        "image": Section(image, 25),
        "degree": Section(degree, 80),
        "groups": Section(groups, 40),
        "generation": Section(generation, 15),
        "convnext": Section(convnext, 20),
        "libraries": Section(libraries, 5),
        "vllm": Section(vllm, 180),
    },
}


def within(sections: Mapping[str, Section], budget: float) -> dict[str, Section]:
    """The sections that fit into ``budget`` seconds, in order of importance: each that still fits is taken.

    Example:
        >>> list(hf_ortho.benchmark.within(hf_ortho.benchmark.SECTIONS["cpu"], 20))
        ['decode', 'generation']
    """
    chosen: dict[str, Section] = {}
    for name, section in sections.items():
        if section.seconds <= budget:
            chosen[name] = section
            budget -= section.seconds
    return chosen
