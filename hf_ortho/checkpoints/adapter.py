"""Adapters of peft in the place of a checkpoint: their config, and their activations."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, tensor
from transformers.utils import ADAPTER_CONFIG_NAME as ADAPTER_CONFIG
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers.utils import cached_file

from ..errors import CheckpointError

LABELS = "labels.json"  # the classes of a head that the base model does not have
PREFIX, SUFFIX = "base_model.model.", ".hf_ortho_act"  # around the path of a module in the names of its tensors


def adapter_config(name: str, revision: str | None) -> dict | None:
    """``adapter_config.json`` of a folder or a Hub repository; None if it is not an adapter.

    Raises:
        CheckpointError: it is no configuration of peft, or does not name its base model.
    """
    lenient = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    file = cached_file(name, ADAPTER_CONFIG, revision=revision, **lenient)
    if file is None:
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(f"{name}: its {ADAPTER_CONFIG} is none of peft's")
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(f"{name} is an adapter that does not name its base model (base_model_name_or_path)")
    return config


def base_revision(config: dict) -> str | None:
    """The revision of the base model that an adapter was made for, as far as it is known."""
    return config.get("base_commit") or config.get("revision")


def adapter_labels(name: str, revision: str | None) -> dict[int, str] | None:
    """The classes of an adapter with a head of its own, None for others."""
    file = cached_file(name, LABELS, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    return {int(i): str(label) for i, label in json.loads(Path(file).read_text(encoding="utf-8")).items()}


def fixed_tensors(layer: dict) -> dict[str, Tensor]:
    """Domain and tail slopes of an entry of ``layers`` in an adapter's config."""
    lo, hi = layer["domain"]
    ends = [-math.inf if lo is None else lo, math.inf if hi is None else hi]  # JSON has no infinity
    return {"domain": tensor(ends), "tail_slopes": tensor(layer["tail_slopes"])}


def adapter_tensors(name: str, config: dict, revision: str | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter by the path of their module in the base model.

    Those of an ``OrthoConfig`` adapter get the domain and the slopes of the tails, which its config holds.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    with safe_open(str(cached_file(name, ADAPTER_WEIGHTS, revision=revision)), "pt") as weights:
        for key in weights.keys():  # noqa: SIM118  # no mapping
            path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            tensors.setdefault(path.removesuffix(SUFFIX), {})[leaf] = weights.get_tensor(key)
    for layer in config.get("layers") or []:
        if layer["module"] not in tensors:
            raise CheckpointError(f"{name} is not whole: {ADAPTER_WEIGHTS} lacks {layer['module']}")
        tensors[layer["module"]] |= fixed_tensors(layer)
    return tensors
