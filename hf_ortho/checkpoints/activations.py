"""Read the learnable activations of a saved checkpoint, and nothing else of it."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..activations import FAMILIES, LearnableActivation, parse
from ..activations.base import MAX_DEGREE
from ..errors import ActivationNameError, CheckpointError, ConfigError
from ..files import explain, json_object
from . import weights
from .adapter import ADAPTER_CONFIG, adapter_config, adapter_tensors, base_revision
from .load import check_place
from .provenance import Provenance
from .revision import model_commit

SHARED = ("domain", "tail_slopes")  # the tensors that every family has


@dataclasses.dataclass(frozen=True)
class StoredActivations:
    """What a checkpoint says of its activations.

    Attributes:
        modules: the activations by the path of their tensors, in the order of the layers.
        provenance: what its config records of them, empty if it records nothing.
        commit: the resolved 40-hex commit on the Hub, None for a folder.
    """

    modules: dict[str, LearnableActivation]
    provenance: Provenance
    commit: str | None


def load_activations(name: str, *, revision: str | None = None) -> StoredActivations:
    """Read the config and the activations' tensors of a folder or a Hub model; no other weights are loaded.

    Of an adapter of peft those that it holds, whatever its base model has.

    Raises:
        CheckpointError: there is no checkpoint with safetensors weights, or its activations are not of a known family.
        ConfigError: it has no learnable activations.
    """
    check_place(name)
    try:
        adapter = adapter_config(name, revision)
        commit = model_commit(name, revision) if adapter is None else model_commit(name, revision, ADAPTER_CONFIG)
        revision = commit or revision
        if adapter is None:
            config = json_object(_file(name, CONFIG_NAME, revision, needed=True))
            provenance, tensors = Provenance.of(config, name), _read(name, revision)
        else:
            config, provenance, tensors = _of_adapter(name, adapter, revision)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {explain(error)}") from error
    if not tensors:
        raise ConfigError(f"{name} has no learnable activations; convert it first with hf-ortho convert")
    modules = {}
    for path in sorted(tensors, key=_natural):
        shapes = {key: tuple(value.shape) for key, value in tensors[path].items()}
        field = provenance.layer(path).field
        named = [list(_names(_at(config, field))) if field else [], list(_names(config))]
        modules[path] = _build(named, shapes, f"{path} of {name}")
        modules[path].load_state_dict(tensors[path])
    return StoredActivations(modules, provenance, commit)


def _of_adapter(
    name: str, adapter: dict, revision: str | None
) -> tuple[dict, Provenance, dict[str, dict[str, Tensor]]]:
    """The config that names the activations of an adapter, their provenance and their tensors."""
    tensors = adapter_tensors(name, adapter, revision)
    tensors = {path: found for path, found in tensors.items() if all(key in found for key in SHARED)}
    base = adapter["base_model_name_or_path"]
    if "activation" in adapter:
        provenance = Provenance.of_adapter(adapter, f"{ADAPTER_CONFIG} of {name}")
        return {"activation": adapter["activation"]}, provenance, tensors
    config = json_object(_file(base, CONFIG_NAME, base_revision(adapter), needed=True)) if tensors else {}
    return config, Provenance.of(config, base), tensors  # the base model is the converted one


def _file(name: str, file: str, revision: str | None, needed: bool = False) -> str:
    """Where a file of a model is; empty if there is none and it is not needed."""
    return str(cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=needed) or "")


def _read(name: str, revision: str | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of each activation, by its path and their own names."""
    if index := _file(name, SAFE_WEIGHTS_INDEX_NAME, revision):
        places = weights.weight_map(index)
    elif single := _file(name, SAFE_WEIGHTS_NAME, revision):
        places = dict.fromkeys(weights.shapes(single), SAFE_WEIGHTS_NAME)
    else:
        raise CheckpointError(f"{name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    paths = {path for path in map(_parent, places) if all(_join(path, key) in places for key in SHARED)}
    wanted = defaultdict(list)
    for key, file in places.items():
        if _parent(key) in paths:
            wanted[file].append(key)
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file, keys in wanted.items():
        for key, value in weights.tensors(_file(name, file, revision, needed=True), keys).items():
            tensors[_parent(key)][key.rpartition(".")[2]] = value
    return tensors


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Sort h.2 before h.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def _names(config: Any) -> Iterator[tuple[str, int]]:
    """(family, degree) of each learnable activation that a field of the config names, also behind a ``gated-``."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key != "hf_ortho":
                yield from _names(value)
    elif isinstance(config, str):
        try:
            cls, degree = parse(config.rpartition("-")[2])
        except ActivationNameError:
            return
        yield cls.family, degree


def _at(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


@functools.cache
def _shapes(family: str, degree: int) -> dict[str, tuple[int, ...]]:
    own = FAMILIES[family].initial_parameters(degree, "paper")
    lengths = {key: len(values) for key, values in own.items()} | dict.fromkeys(SHARED, 2)
    return {key: (length,) for key, length in lengths.items()}


def _build(named: list[list[tuple[str, int]]], shapes: dict[str, tuple[int, ...]], where: str) -> LearnableActivation:
    """The activation with tensors of these names and shapes: the one that the config names, else the only one."""
    everything = [(family, degree) for family in FAMILIES for degree in range(1, MAX_DEGREE + 1)]
    for known in (*named, everything):
        fitting = sorted({entry for entry in known if _shapes(*entry) == shapes})
        if len(fitting) == 1:
            family, degree = fitting[0]
            return FAMILIES[family](degree)
        if fitting:
            names = " or ".join(f"{family}_{degree}" for family, degree in fitting)
            raise CheckpointError(f"the tensors of {where} could be {names}: the config does not tell which")
    found = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items()))
    raise CheckpointError(f"the tensors of {where} ({found}) are not those of any of {', '.join(FAMILIES)}")
