"""Read only the learnable activations of a saved checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..activations import FAMILIES, LearnableActivation, parse
from ..activations.base import MAX_DEGREE, SHARED
from ..errors import ActivationNameError, CheckpointError, ConfigError
from ..files import explain, json_object
from . import weights
from .adapter import ADAPTER_CONFIG, adapter_config, adapter_tensors, base_revision
from .place import check_place
from .provenance import Provenance
from .revision import model_commit
from .values import check_values

NAMES = frozenset(SHARED).union(*(family.initial_parameters(1, "paper") for family in FAMILIES.values()))


@dataclasses.dataclass(frozen=True)
class StoredActivations:
    """The learnable activations of a checkpoint.

    Attributes:
        modules: the activations by the path of their tensors, in the order of the layers.
        provenance: the provenance recorded in the config; may be empty.
        commit: the resolved 40-hex commit on the Hub, None for a folder.
    """

    modules: dict[str, LearnableActivation]
    provenance: Provenance
    commit: str | None


def load_activations(name: str, *, revision: str | None = None) -> StoredActivations:
    """Read the config and the activations' tensors of a folder or a Hub model; no other weights are loaded.

    For a peft adapter, only the activations in the adapter are read, not those of its base model.

    Raises:
        CheckpointError: there is no checkpoint with safetensors weights, it is incomplete, a family is unknown, or a
            value of an activation is not valid.
        ConfigError: the checkpoint has no learnable activations.
    """
    check_place(name)
    try:
        adapter = adapter_config(name, revision)
        commit = model_commit(name, revision) if adapter is None else model_commit(name, revision, ADAPTER_CONFIG)
        revision = commit or revision
        if adapter is None:
            config = json_object(_file(name, CONFIG_NAME, revision, needed=True))
            provenance = Provenance.of(config, name)
            tensors = stored_tensors(name, revision, [layer.module for layer in provenance.layers])
        else:
            config, provenance, tensors = _of_adapter(name, adapter, revision)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {explain(error)}") from error
    if tensors is None:
        raise CheckpointError(f"{name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    if not tensors:
        raise ConfigError(f"{name} has no learnable activations; convert it first with hf-ortho convert")
    modules = {}
    for path in sorted(tensors, key=_natural):
        shapes = {key: tuple(value.shape) for key, value in tensors[path].items()}
        field = provenance.layer(path).field
        named = [list(_names(_at(config, field))) if field else [], list(_names(config))]
        modules[path] = _build(named, shapes, f"{path} of {name}")
        check_values(tensors[path], f"{path} of {name}")
        modules[path].load_state_dict(tensors[path])
    return StoredActivations(modules, provenance, commit)


def _of_adapter(
    name: str, adapter: dict, revision: str | None
) -> tuple[dict, Provenance, dict[str, dict[str, Tensor]]]:
    """The config that names the activations of an adapter, their provenance and their tensors."""
    tensors = adapter_tensors(name, adapter, revision)
    tensors = {path: by_key for path, by_key in tensors.items() if all(key in by_key for key in SHARED)}
    base = adapter["base_model_name_or_path"]
    if "activation" in adapter:
        provenance = Provenance.of_adapter(adapter, f"{ADAPTER_CONFIG} of {name}")
        return {"activation": adapter["activation"]}, provenance, tensors
    config = json_object(_file(base, CONFIG_NAME, base_revision(adapter), needed=True)) if tensors else {}
    return config, Provenance.of(config, base), tensors  # an adapter of a converted base model


def _file(name: str, file: str, revision: str | None, needed: bool = False) -> str:
    """The local path of a file of a model; empty if it is missing and not needed."""
    return str(cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=needed) or "")


def stored_tensors(
    name: str, revision: str | None, expected: Iterable[str] = ()
) -> dict[str, dict[str, Tensor]] | None:
    """The tensors of each activation, by its path and the tensor's name in it; None without safetensors weights.

    Raises:
        CheckpointError: a file is damaged, or an activation, such as one of ``expected``, lacks tensors.
    """
    if single := _file(name, SAFE_WEIGHTS_NAME, revision):  # transformers prefers it as well
        places = dict.fromkeys(weights.shapes(single), SAFE_WEIGHTS_NAME)
    elif index := _file(name, SAFE_WEIGHTS_INDEX_NAME, revision):
        places = weights.weight_map(index)
    else:
        return None
    leaves = defaultdict(set)
    for key in places:
        leaves[_parent(key)].add(key.rpartition(".")[2])
    series = NAMES.difference(SHARED)
    paths = {path for path, found in leaves.items() if "tail_slopes" in found or ("domain" in found and found & series)}
    for path in expected:
        # Renamed or left out with the module around it, as in the encoder of an encoder-decoder, it is not missing.
        if any(other.startswith(f"{_parent(path)}.") for other in leaves):
            paths.add(path)
    for path in sorted(paths, key=_natural):
        if lacking := [key for key in SHARED if key not in leaves[path]]:
            raise CheckpointError(f"{name} is incomplete: its weights lack {_join(path, lacking[0])}")
    keys_by_file = defaultdict(list)
    for key, file in places.items():
        if _parent(key) in paths:
            keys_by_file[file].append(key)
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file, keys in keys_by_file.items():
        for key, value in weights.tensors(_file(name, file, revision, needed=True), keys).items():
            tensors[_parent(key)][key.rpartition(".")[2]] = value
    return tensors


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts h.2 before h.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def _names(config: Any) -> Iterator[tuple[str, int]]:
    """(family, degree) of each learnable activation named in the config, also after a prefix such as ``gated-``."""
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
    parameters = FAMILIES[family].initial_parameters(degree, "paper")
    lengths = {key: len(values) for key, values in parameters.items()} | dict.fromkeys(SHARED, 2)
    return {key: (length,) for key, length in lengths.items()}


def _build(named: list[list[tuple[str, int]]], shapes: dict[str, tuple[int, ...]], where: str) -> LearnableActivation:
    """The activation with tensors of these names and shapes: the one named in the config, or the only match."""
    everything = [(family, degree) for family in FAMILIES for degree in range(1, MAX_DEGREE + 1)]
    for candidates in (*named, everything):
        matches = sorted({entry for entry in candidates if _shapes(*entry) == shapes})
        if len(matches) == 1:
            family, degree = matches[0]
            return FAMILIES[family](degree)
        if matches:
            names = " or ".join(f"{family}_{degree}" for family, degree in matches)
            raise CheckpointError(f"the tensors of {where} match {names}: the config does not say which one it is")
    listing = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items()))
    raise CheckpointError(f"the tensors of {where} ({listing}) match none of the families {', '.join(FAMILIES)}")
