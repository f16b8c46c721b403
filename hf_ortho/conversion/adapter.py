"""Adapters of peft in the place of a checkpoint: their config, and their activations."""

from __future__ import annotations

import json
import math
from pathlib import Path

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from safetensors import safe_open
from torch import Tensor, tensor
from transformers.utils import cached_file

PREFIX, SUFFIX = "base_model.model.", ".hf_ortho_act"  # around the path of a module in the names of its tensors


def adapter_config(name: str, revision: str | None) -> dict | None:
    """``adapter_config.json`` of a folder or a Hub repository; None if it is not an adapter."""
    lenient = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    file = cached_file(name, ADAPTER_CONFIG, revision=revision, **lenient)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


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
        lo, hi = layer["domain"]
        ends = -math.inf if lo is None else lo, math.inf if hi is None else hi  # JSON has no infinity
        tensors[layer["module"]] |= {"domain": tensor(ends), "tail_slopes": tensor(layer["tail_slopes"])}
    return tensors
