"""What a card says of a PEFT adapter, from its config and its safetensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, base_revision
from ..checkpoints.provenance import Provenance
from ..checkpoints.weights import shapes
from .base_card import Base
from .card_layers import folded, formulas, paths_list, stored_table, weight_of
from .card_loading import ADAPTED, task_of_class

KINDS = {"LORA": "LoRA", "LN_TUNING": "LN-tuning"}


def adapter_parts(config: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What a card says of an adapter."""
    provenance, kind = Provenance.of_adapter(config, str((folder or Path()) / ADAPTER_CONFIG)), str(config["peft_type"])
    activation = provenance.activation
    base = Base(config.get("base_model_name_or_path"), base_revision(config))
    weights = (folder or Path()) / ADAPTER_WEIGHTS
    found = folder is not None and weights.is_file()
    tensors = {key: math.prod(shape) for key, shape in shapes(weights).items()} if found else {}
    parameters, size = sum(tensors.values()), weights.stat().st_size if found else 0
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
    tables = [stored_table(provenance.layers)] if activation and provenance.layers else []
    tables += [folded(["module", "parameters each"], rows, "modules")] if rows else []
    return {
        "base": base,
        "relation": "adapter",
        "library": "peft",
        "task": ADAPTED.get(str(config.get("task_type")), task_of_class(cls))[0],
        "tags": [*provenance.tags, "peft", "adapter" if activation else kind.lower()],
        "summary": summary,
        "conversion": conversion,
        "layers": "\n\n".join(tables),
        "weight": weight_of(provenance.calibrated) if len(tables) == 2 else "",
        "notes": [],
        "versions": {name: config[f"{name}_version"] for name in ("hf_ortho", "peft") if config.get(f"{name}_version")},
        "limits": "It works with the base model that it was made for, and no other. ",
    }


def _module(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".")[0]


def _names(names: Any) -> str:
    return ", ".join(paths_list(sorted(names)) if isinstance(names, list) else [f"`{names}`"])
