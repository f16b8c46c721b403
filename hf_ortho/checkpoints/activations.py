"""Read the learnable activations of a saved checkpoint, and nothing else of it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..activations import FAMILIES, LearnableActivation, parse
from ..activations.base import MAX_DEGREE
from ..errors import ActivationNameError, CheckpointError, ConfigError
from ..files import explain
from .adapter import ADAPTER_CONFIG, adapter_config, adapter_tensors, base_revision
from .load import check_place, commit_of

SHARED = ("domain", "tail_slopes")  # the tensors that every family has


@dataclasses.dataclass(frozen=True)
class StoredActivations:
    """What a checkpoint says of its activations.

    Attributes:
        modules: the activations by the path of their tensors, in the order of the layers.
        provenance: ``hf_ortho`` of the config, empty if the model was not converted.
        commit: the resolved 40-hex commit on the Hub, None for a folder.
    """

    modules: dict[str, LearnableActivation]
    provenance: dict
    commit: str | None


def load_activations(name: str, *, revision: str | None = None) -> StoredActivations:
    """Read the config and the activations' tensors of a folder or a Hub model; no other weights are loaded.

    Of an adapter of peft those that it holds, whatever its base model has.

    Raises:
        CheckpointError: there is no checkpoint with safetensors weights, or its activations are of no known family.
        ConfigError: it has no learnable activations.
    """
    check_place(name)
    try:
        adapter = checked_adapter(name, revision)
        commit = commit_of(name, revision) if adapter is None else commit_of(name, revision, ADAPTER_CONFIG)
        revision = commit or revision
        if adapter is None:
            config = json.loads(Path(_file(name, "config.json", revision)).read_text(encoding="utf-8"))
            tensors = _read(name, revision)
        else:
            config, tensors = _of_adapter(name, adapter, revision)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {explain(error)}") from error
    if not tensors:
        raise ConfigError(f"{name} has no learnable activations; convert it first with hf-ortho convert")
    provenance = provenance_of(config)
    _check(provenance, f"hf_ortho in the config of {name}", ("module",))
    layers = _layers(provenance)
    modules = {}
    for path in sorted(tensors, key=_natural):
        shapes = {key: tuple(value.shape) for key, value in tensors[path].items()}
        field = layers.get(path, {}).get("field")
        named = [list(_names(_at(config, field))) if field else [], list(_names(config))]
        modules[path] = _build(named, shapes, f"{path} of {name}")
        modules[path].load_state_dict(tensors[path])
    return StoredActivations(modules, provenance, commit)


def checked_adapter(name: str, revision: str | None) -> dict | None:
    """``adapter_config.json`` of a folder or a Hub repository; None if it is not an adapter.

    Raises:
        CheckpointError: it cannot be read, or its layers are not what hf_ortho writes.
    """
    try:
        adapter = adapter_config(name, revision)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {explain(error)}") from error
    if adapter is None:
        return None
    where = f"{ADAPTER_CONFIG} of {name}"
    for key in ("revision", "base_commit"):
        if not _is_text(adapter.get(key)):
            raise CheckpointError(f"{where}: {key} is {adapter[key]!r:.80}, where text is expected")
    _check(adapter, where, ("module", "domain", "tail_slopes"))
    return adapter


def _check(entry: dict, where: str, needed: tuple[str, ...]) -> None:
    """Raise CheckpointError if ``layers`` or ``source_activations`` are not what hf_ortho writes."""
    layers, sources = entry.get("layers") or [], entry.get("source_activations") or {}
    if not isinstance(sources, dict) or not all(isinstance(value, str) for value in sources.values()):
        expected = "a dictionary of fields and names"
        raise CheckpointError(f"{where}: source_activations is {sources!r:.80}, where {expected} is expected")
    for layer in layers if isinstance(layers, list) else [layers]:
        if (
            not isinstance(layer, dict)
            or any(layer.get(key) is None for key in needed)
            or not all(_is_text(layer.get(key)) for key in ("module", "field", "source"))
            or not all(_is_pair(layer.get(key, [None, None])) for key in ("domain", "tail_slopes"))
        ):
            expected = f"a dictionary with {', '.join(needed)}"
            raise CheckpointError(f"{where}: layers holds {layer!r:.80}, where {expected} is expected")


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_pair(value: Any) -> bool:
    numbers = isinstance(value, list) and all(end is None or isinstance(end, int | float) for end in value)
    return numbers and len(value) == 2


def _of_adapter(name: str, adapter: dict, revision: str | None) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """The config that tells of the activations of an adapter, and their tensors."""
    tensors = adapter_tensors(name, adapter, revision)
    tensors = {path: found for path, found in tensors.items() if all(key in found for key in SHARED)}
    base = adapter["base_model_name_or_path"]
    if "activation" not in adapter:  # the base model is the converted one
        file = _file(base, "config.json", base_revision(adapter)) if tensors else ""
        return (json.loads(Path(file).read_text(encoding="utf-8")) if file else {}), tensors
    provenance = {key: adapter[key] for key in ("activation", "source_activations", "calibrated", "layers")}
    provenance |= {"source_model": base, "source_revision": adapter["base_commit"], "tails": True}
    return {"activation": adapter["activation"], "hf_ortho": provenance}, tensors


def _file(name: str, file: str, revision: str | None) -> str:
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return str(found or "")


def _read(name: str, revision: str | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of each activation, by its path and their own names."""
    index = _file(name, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index:
        content = json.loads(Path(index).read_text(encoding="utf-8"))
        places: Any = content.get("weight_map") if isinstance(content, dict) else None
    else:
        single = _file(name, SAFE_WEIGHTS_NAME, revision)
        if not single:
            raise CheckpointError(f"{name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
        with safe_open(single, "pt") as weights:
            places = dict.fromkeys(weights.keys(), SAFE_WEIGHTS_NAME)
    files = places.values() if isinstance(places, dict) else [places]
    if not all(isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors") for file in files):
        raise CheckpointError(f"{SAFE_WEIGHTS_INDEX_NAME} of {name} must name files that end in .safetensors")
    paths = {path for path in map(_parent, places) if all(_join(path, key) in places for key in SHARED)}
    wanted = defaultdict(list)
    for key, file in places.items():
        if _parent(key) in paths:
            wanted[file].append(key)
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file, keys in wanted.items():
        with safe_open(_file(name, file, revision), "pt") as weights:
            for key in keys:
                tensors[_parent(key)][key.rpartition(".")[2]] = weights.get_tensor(key)
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
    raise CheckpointError(f"the tensors of {where} ({found}) are those of none of {', '.join(FAMILIES)}")


def provenance_of(config: Any) -> dict:
    """The dictionary ``hf_ortho`` of a config, which may be a dictionary itself; empty without one."""
    found = config.get("hf_ortho") if isinstance(config, Mapping) else getattr(config, "hf_ortho", None)
    return found if isinstance(found, dict) else {}


def _layers(provenance: dict) -> dict[str, dict]:
    return {layer["module"]: layer for layer in provenance.get("layers") or []}


def pure_domain(provenance: dict, module: str) -> tuple[float, float] | None:
    """The interval that an activation without tails was fitted on, None for others."""
    domain = _layers(provenance).get(module, {}).get("domain")
    return None if provenance.get("tails", True) or not domain or None in domain else tuple(domain)


def source_names(provenance: dict, modules: Iterable[str]) -> dict[str, str | None]:
    """The name in ``ACT2FN`` of what each module replaced: as noted for it, else the one that all have in common."""
    layers = _layers(provenance)
    fields = {field: value.rpartition("-")[2] for field, value in (provenance.get("source_activations") or {}).items()}
    common = next(iter(fields.values())) if len(set(fields.values())) == 1 else None

    def of(module: str) -> str | None:
        layer = layers.get(module, {})
        return layer.get("source") or fields.get(layer.get("field", ""), common)

    return {module: of(module) for module in modules}
