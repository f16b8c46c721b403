"""Read only the learnable activations of a saved checkpoint."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..activations import FAMILIES, LearnableActivation, parse
from ..activations.base import MAX_DEGREE, SHARED
from ..activations.registry import ParsedName
from ..errors import ActivationNameError, CheckpointError, ConfigError
from ..files import explain, json_object
from ..path_patterns import thin
from . import weights
from .adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_config,
    adapter_keys,
    base_revision,
    fixed_tensors,
)
from .place import check_place
from .provenance import Provenance
from .revision import model_commit
from .stored import weight_files
from .values import check_values

NAMES = frozenset(SHARED).union(*(family.initial_parameters(1, "paper") for family in FAMILIES.values()))
Places = dict[str, dict[str, tuple[str, str]]]  # (file, name) of tensors, by the path of their module and their own


@dataclasses.dataclass(frozen=True)
class StoredActivations:
    """The learnable activations of a checkpoint.

    Attributes:
        modules: the activations by the path of their tensors, in the order of the layers.
        left_out: number of further activations, which were not read.
        provenance: the provenance recorded in the config; may be empty.
        commit: the resolved 40-hex commit on the Hub, None for a folder.
    """

    modules: dict[str, LearnableActivation]
    provenance: Provenance
    commit: str | None
    left_out: int = 0


def load_activations(name: str, *, revision: str | None = None, most: int = sys.maxsize) -> StoredActivations:
    """Read the config and the activations' tensors of a folder or a Hub model; no other weights are loaded.

    For a peft adapter, only the activations in the adapter are read, not those of its base model.

    Args:
        most: read at most this number of activations, evenly spaced.

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
            config = json_object(str(cached_file(name, CONFIG_NAME, revision=revision)))
            provenance = Provenance.of(config, name)
            found = stored_places(name, revision, [layer.module for layer in provenance.layers])
            if found is None:
                raise CheckpointError(f"{name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
            places = found
        else:
            config, provenance, places = _of_adapter(name, adapter, revision)
        paths = sorted(places, key=_natural)
        chosen = [paths[i] for i in thin(len(paths), most)]
        tensors = _read(name, revision, {path: places[path] for path in chosen})
        if adapter is not None and "activation" in adapter:
            for path in chosen:
                tensors[path] |= fixed_tensors(provenance, path)
        everywhere = list(_names(config))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {explain(error)}") from error
    if not tensors:
        raise ConfigError(f"{name} has no learnable activations; convert it first with hf-ortho convert")
    modules = {}
    at_field: dict[str, list[ParsedName]] = {}
    for path in chosen:
        shapes = {key: tuple(value.shape) for key, value in tensors[path].items()}
        field = provenance.layer(path).field
        if field and field not in at_field:
            at_field[field] = list(_names(_at(config, field)))
        modules[path] = _build([at_field[field] if field else [], everywhere], shapes, f"{path} of {name}")
        check_values(tensors[path], f"{path} of {name}")
        modules[path].load_state_dict(tensors[path])
    return StoredActivations(modules, provenance, commit, len(paths) - len(chosen))


def _of_adapter(name: str, adapter: dict, revision: str | None) -> tuple[dict, Provenance, Places]:
    """The config that names the activations of an adapter, their provenance, and the places of their tensors."""
    keys = adapter_keys(name, revision)
    base = adapter["base_model_name_or_path"]
    if "activation" in adapter:
        provenance = Provenance.of_adapter(adapter, f"{ADAPTER_CONFIG} of {name}")
        paths = [layer.module for layer in provenance.layers]
        if missing := next((path for path in paths if path not in keys), None):
            raise CheckpointError(f"{name} is incomplete: {ADAPTER_WEIGHTS} has no tensors for {missing}")
        config = {"activation": adapter["activation"]}
    else:  # an adapter of a converted base model
        paths = [path for path, by_leaf in keys.items() if all(key in by_leaf for key in SHARED)]
        config = json_object(str(cached_file(base, CONFIG_NAME, revision=base_revision(adapter)))) if paths else {}
        provenance = Provenance.of(config, base)
    places = {path: {leaf: (ADAPTER_WEIGHTS, key) for leaf, key in keys[path].items()} for path in paths}
    return config, provenance, places


def stored_tensors(name: str, revision: str | None) -> dict[str, dict[str, Tensor]] | None:
    """The tensors of each activation, by its path and the tensor's name in it; None without safetensors weights.

    Raises:
        CheckpointError: a file is damaged, or an activation lacks tensors.
    """
    places = stored_places(name, revision)
    return None if places is None else _read(name, revision, places)


def stored_places(name: str, revision: str | None, expected: Iterable[str] = ()) -> Places | None:
    """The places of the tensors of each activation; None without safetensors weights.

    Raises:
        CheckpointError: a file is damaged, or an activation, such as one of ``expected``, lacks tensors.
    """
    places = weight_files(name, revision)
    if places is None:
        return None
    by_path: Places = defaultdict(dict)
    for key, file in places.items():
        path, _, leaf = key.rpartition(".")
        by_path[path][leaf] = file, key
    series, ordered = NAMES.difference(SHARED), sorted(by_path)
    paths = {
        path
        for path, found in by_path.items()
        if "tail_slopes" in found or ("domain" in found and found.keys() & series)
    }
    for path in expected:
        # Renamed or left out with the module around it, as in the encoder of an encoder-decoder, it is not missing.
        parent = path.rpartition(".")[0] + "."
        first = bisect.bisect_left(ordered, parent)
        if first < len(ordered) and ordered[first].startswith(parent):
            paths.add(path)
    for path in sorted(paths, key=_natural):
        if lacking := [key for key in SHARED if key not in by_path[path]]:
            raise CheckpointError(f"{name} is incomplete: its weights lack {f'{path}.{lacking[0]}'.removeprefix('.')}")
    return {path: by_path[path] for path in paths}


def _read(name: str, revision: str | None, places: Places) -> dict[str, dict[str, Tensor]]:
    """The tensors at ``places``, by path and name. Only the files that hold them are downloaded."""
    keys_by_file = defaultdict(list)
    for by_leaf in places.values():
        for file, key in by_leaf.values():
            keys_by_file[file].append(key)
    tensors = {
        file: weights.tensors(str(cached_file(name, file, revision=revision)), keys)
        for file, keys in keys_by_file.items()
    }
    return {
        path: {leaf: tensors[file][key] for leaf, (file, key) in by_leaf.items()} for path, by_leaf in places.items()
    }


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts h.2 before h.10."""
    return [(part.isdecimal(), len(part) if part.isdecimal() else 0, part) for part in path.split(".")]


def _names(config: Any) -> Iterator[ParsedName]:
    """The name of each learnable activation named in the config, also after a prefix such as ``gated-``."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key != "hf_ortho":
                yield from _names(value)
    elif isinstance(config, str):
        try:
            yield parse(config.rpartition("-")[2])
        except ActivationNameError:
            return


def _at(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


@functools.cache
def _shapes(name: ParsedName) -> dict[str, tuple[int, ...]]:
    lengths = {key: len(values) for key, values in name.cls.initial_parameters(name.degree, "paper").items()}
    lead = (name.groups,) if name.groups > 1 else ()
    return {key: (*lead, length) for key, length in (lengths | {"domain": 2}).items()} | {"tail_slopes": (2,)}


def _build(named: list[list[ParsedName]], shapes: dict[str, tuple[int, ...]], where: str) -> LearnableActivation:
    """The activation with tensors of these names and shapes: the one named in the config, or the only match."""
    domain = shapes.get("domain", ())
    groups = domain[0] if len(domain) == 2 else 1
    everything = [ParsedName(cls, degree, groups) for cls in FAMILIES.values() for degree in range(1, MAX_DEGREE + 1)]
    for candidates in (*named, everything):
        matches = {entry.name: entry for entry in candidates if _shapes(entry) == shapes}
        if len(matches) == 1:
            return next(iter(matches.values())).build()
        if matches:
            names = " or ".join(sorted(matches))
            raise CheckpointError(f"the tensors of {where} match {names}: the config does not say which one it is")
    listing = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items()))
    raise CheckpointError(f"the tensors of {where} ({listing}) match none of the families {', '.join(FAMILIES)}")
