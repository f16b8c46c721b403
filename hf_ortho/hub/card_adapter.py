"""What a card says of a PEFT adapter, from its config and its safetensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..checkpoints.adapter import ADAPTER_WEIGHTS, PREFIX, base_revision
from ..conversion.convert import tags_of
from ..errors import CheckpointError
from ..tasks import head_of
from .base_card import Base
from .card_layers import folded, formulas, paths_list, stored_table, weight_of

KINDS = {"LORA": "LoRA", "LN_TUNING": "LN-tuning"}


def adapter_parts(config: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What a card says of an adapter."""
    activation, kind = config.get("activation"), str(config["peft_type"])
    base = Base(config.get("base_model_name_or_path"), base_revision(config))
    tensors = _tensors(folder / ADAPTER_WEIGHTS) if folder is not None else {}
    parameters = sum(tensors.values())
    size = (folder / ADAPTER_WEIGHTS).stat().st_size if folder is not None and tensors else 0
    saved = config.get("modules_to_save")
    cls = str((config.get("auto_mapping") or {}).get("base_model_class"))  # which peft notes without a task_type
    what = f"learnable `{activation}` activations" if activation else kind
    summary = f"PEFT adapter ({what}) for {base}: {parameters:,} parameters, {size:,} bytes."
    if activation:
        conversion = f"The activations of the base model become {activation}:\n\n{formulas(activation)}"
        conversion += "\n\nThe base model itself stays as it is; `merge_and_unload()` gives a converted model."
    else:
        conversion = f"{KINDS.get(kind, kind)} on {_names(config.get('target_modules'))}."
    if saved:
        conversion += f" Trained and saved whole: {_names(saved)}."
    modules: dict[str, int] = {}
    for key, count in tensors.items():
        path = _module(key)
        modules[path] = modules.get(path, 0) + count
    sizes: dict[int, list[str]] = {}
    for path, count in modules.items():
        sizes.setdefault(count, []).append(path)
    rows = [[place, f"{count:,}"] for count, paths in sizes.items() for place in paths_list(paths)]
    tables = [stored_table(config["layers"])] if activation and config.get("layers") else []
    tables += [folded(["module", "parameters each"], rows, "modules")] if rows else []
    return {
        "base": base,
        "relation": "adapter",
        "library": "peft",
        "task": head_of(config.get("task_type") or cls).pipeline_tag,
        "tags": [*tags_of(activation), "peft", "adapter" if activation else kind.lower()],
        "summary": summary,
        "conversion": conversion,
        "layers": "\n\n".join(tables),
        "weight": weight_of(config.get("calibrated")) if len(tables) == 2 else "",
        "notes": [],
        "versions": {name: config[f"{name}_version"] for name in ("hf_ortho", "peft") if config.get(f"{name}_version")},
        "limits": "It works with the base model that it was made for, and no other. ",
    }


def _tensors(path: Path) -> dict[str, int]:
    """Name and number of elements of each tensor; empty without the file."""
    if not path.is_file():
        return {}
    try:
        with safe_open(str(path), "pt") as weights:
            return {key: math.prod(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _module(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".")[0]


def _names(names: Any) -> str:
    return ", ".join(paths_list(sorted(names)) if isinstance(names, list) else [f"`{names}`"])
