"""The sections of a benchmark, in order."""

from __future__ import annotations

from collections.abc import Callable

from .activation_cases import decode, degree, elements, image, libraries, sequence
from .model_cases import convnext, generation, gpt2
from .results import BenchResults
from .settings import Settings

SECTIONS: dict[str, Callable[[BenchResults, Settings], None]] = {
    "sequence": sequence,
    "image": image,
    "libraries": libraries,
    "elements": elements,
    "degree": degree,
    "decode": decode,
    "gpt2": gpt2,
    "convnext": convnext,
    "generation": generation,
}
