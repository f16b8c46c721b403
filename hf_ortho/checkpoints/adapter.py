"""Read peft adapters: their config and their activations."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, tensor
from transformers.utils import ADAPTER_CONFIG_NAME as ADAPTER_CONFIG
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers.utils import cached_file

from ..activations.base import SHARED
from ..errors import CheckpointError
from ..files import explain, json_object
from . import weights
from .provenance import LayerProvenance, Provenance
from .values import check_values

LABELS = "labels.json"  # the classes of a new head
ATTRIBUTE = "hf_ortho_act"  # attribute of an OrthoLayer with the activations by adapter name
PREFIX, SUFFIX = "base_model.model.", f".{ATTRIBUTE}"  # around a module's path in the names of its tensors


def adapter_config(name: str, revision: str | None) -> dict | None:
    """``adapter_config.json`` of a folder or a Hub repository; None if it is not an adapter.

    Raises:
        CheckpointError: the file cannot be read, is not a peft config, does not name its base model, or has an invalid
            value.
    """
    lenient = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    try:
        file = cached_file(name, ADAPTER_CONFIG, revision=revision, **lenient)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {explain(error)}") from error
    if file is None:
        return None
    config = json_object(file)
    if "peft_type" not in config:
        raise CheckpointError(f"{name}: {ADAPTER_CONFIG} is not a peft config: it has no peft_type")
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(f"{name} is an adapter that does not name its base model (base_model_name_or_path)")
    where = f"{ADAPTER_CONFIG} of {name}"
    Provenance.of_adapter(config, where)
    if not isinstance(at := config.get("revision"), str | None):
        raise CheckpointError(f"{where}: revision is {at!r:.80}; expected text")
    return config


def base_revision(config: dict) -> str | None:
    """The revision of the base model that an adapter was made for, if known."""
    return config.get("base_commit") or config.get("revision")


def adapter_labels(name: str, revision: str | None) -> dict[int, str] | None:
    """The classes of an adapter with a new head, otherwise None."""
    file = cached_file(name, LABELS, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    return {int(i): str(label) for i, label in json_object(file).items()}


def fixed_tensors(layer: LayerProvenance) -> dict[str, Tensor]:
    """Domain and tail slopes of an activation, which an adapter stores in its config."""
    return {"domain": tensor(layer.domain), "tail_slopes": tensor(layer.tail_slopes)}


def has_safetensors(name: str, revision: str | None) -> bool:
    """Whether the weights of an adapter are stored as safetensors, not only pickled."""
    return bool(cached_file(name, ADAPTER_WEIGHTS, revision=revision, _raise_exceptions_for_missing_entries=False))


def adapter_tensors(name: str, config: Mapping, revision: str | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter by the path of their module in the base model.

    For an ``OrthoConfig`` adapter they include the domain and the tail slopes from its config.

    Raises:
        CheckpointError: the adapter is incomplete, or a value of an activation is not valid.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.tensors(str(cached_file(name, ADAPTER_WEIGHTS, revision=revision))).items():
        path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        tensors.setdefault(path.removesuffix(SUFFIX), {})[leaf] = value
    for layer in Provenance.of_adapter(config, f"{ADAPTER_CONFIG} of {name}").layers:
        if layer.module not in tensors:
            raise CheckpointError(f"{name} is incomplete: {ADAPTER_WEIGHTS} has no tensors for {layer.module}")
        tensors[layer.module] |= fixed_tensors(layer)
    for path, by_key in tensors.items():
        if all(key in by_key for key in SHARED):
            check_values(by_key, f"{path} of {name}")
    return tensors
