"""The headers, indices and tensors of safetensors files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import explain, json_object


def shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its name, from the header, against which the size of the file is checked.

    Raises:
        CheckpointError: the file is damaged or cut short.
    """
    with _opened(file) as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def tensors(file: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of these names, or all; no others of the file are read.

    Raises:
        CheckpointError: the file is damaged or cut short, or lacks one of them.
    """
    with _opened(file) as weights:
        return {name: weights.get_tensor(name) for name in (weights.keys() if names is None else names)}


def weight_map(index: str | Path) -> dict[str, str]:
    """The file that each tensor is in, by its name, from a ``model.safetensors.index.json``.

    Raises:
        CheckpointError: it cannot be read, or does not name files beside it that end in .safetensors.
    """
    places = json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} lists no weights: weight_map is {places!r:.80}, where tensors are expected")
    for name, file in places.items():
        if not (isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")):
            expected = "the name of a file that ends in .safetensors"
            raise CheckpointError(f"{index}: weight_map puts {name} in {file!r:.80}, where {expected} is expected")
    return places


@contextlib.contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as weights:
            yield weights
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or cut short: {explain(error)}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {explain(error)}") from error
