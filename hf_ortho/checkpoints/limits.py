"""Stop a library that builds a model far larger than its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils import cached_file

from ..errors import CheckpointError
from . import weights
from .stored import weight_files

# How much a model may exceed its stored weights: tied, quantized or new parameters, and those registered twice.
TENSORS, MORE_TENSORS = 10, 10_000
ELEMENTS, MORE_ELEMENTS = 32, 10**8


def model_shapes(name: str, revision: str | None) -> list[tuple[int, ...]] | None:
    """The shapes of the stored tensors of a model; None without safetensors weights."""
    if (places := weight_files(name, revision)) is None:
        return None
    files = set(places.values())
    return [
        shape for file in files for shape in weights.shapes(str(cached_file(name, file, revision=revision))).values()
    ]


@contextlib.contextmanager
def limited(stored: Sequence[tuple[int, ...]] | None, where: str) -> Iterator[None]:
    """Limit the parameters that are registered in modules by the shapes of the stored tensors, if known.

    A damaged or hostile config with a billion layers, tokens or ranks would otherwise take all time or memory.

    Raises:
        CheckpointError: there are more; ``where`` names the config.
    """
    if stored is None:
        yield
        return
    values = sum(map(math.prod, stored))
    found, size = 0, 0

    def count(module, name, parameter) -> None:
        nonlocal found, size
        found, size = found + 1, size + (0 if parameter is None else parameter.numel())
        if found > TENSORS * len(stored) + MORE_TENSORS or size > ELEMENTS * values + MORE_ELEMENTS:
            raise CheckpointError(
                f"{where} describes far more parameters than its weights have ({len(stored)} tensors with {values:,} "
                "values); one of the two files is damaged"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
