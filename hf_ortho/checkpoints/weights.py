"""Read the headers, indices and tensors of safetensors files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import explain, json_object

LONGEST_NAME = 255  # bytes of a file name


def shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its name. Reads only the header, and checks the size of the file against it.

    Raises:
        CheckpointError: the file is damaged or truncated.
    """
    with _opened(file) as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def tensors(file: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors with these names, or all tensors. Others are not read.

    Raises:
        CheckpointError: the file is damaged or truncated, or a tensor is missing.
    """
    with _opened(file) as weights:
        return {name: weights.get_tensor(name) for name in (weights.keys() if names is None else names)}


def weight_map(index: str | Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name, from a ``model.safetensors.index.json``.

    Raises:
        CheckpointError: the index cannot be read, or names something other than .safetensors files beside it.
    """
    places = json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} lists no weights: weight_map is {places!r:.80}; expected tensors")
    for name, file in places.items():
        valid = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not valid or len(file.encode("utf-8", "replace")) > LONGEST_NAME:
            raise CheckpointError(f"{index}: weight_map puts {name} in {file!r:.80}; expected a .safetensors file name")
    return places


@contextlib.contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as weights:
            yield weights
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or truncated: {explain(error)}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {explain(error)}") from error
