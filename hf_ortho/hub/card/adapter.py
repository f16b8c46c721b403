"""The card contents of a peft adapter, from its config and the header of its weights."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from ...checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, SUFFIX, base_revision, provenance_of
from ...checkpoints.weights import shapes
from ...tasks import head_of
from ...text import Markdown, code
from .base import Base
from .parts import NOTHING, CardParts
from .tables import folded, formulas, legend, paths_list, stored_table

METHODS = {"LORA": "LoRA", "LN_TUNING": "LN-tuning"}


def adapter_parts(config: dict[str, Any], folder: Path | None) -> CardParts:
    """The card contents of the adapter with this ``adapter_config.json`` and the weights in ``folder``."""
    provenance = provenance_of(config, str((folder or Path()) / ADAPTER_CONFIG))
    activation, kind = provenance.activation, str(config["peft_type"])
    weights = None if folder is None or not (folder / ADAPTER_WEIGHTS).is_file() else folder / ADAPTER_WEIGHTS
    modules: dict[str, int] = defaultdict(int)
    for key, shape in (shapes(weights) if weights else {}).items():
        if key.endswith(f"{SUFFIX}.domain"):  # of groups: it is not trained
            continue
        modules[key.removeprefix(PREFIX).rpartition(".")[0]] += math.prod(shape)
    sizes: dict[int, list[str]] = defaultdict(list)
    for path, count in modules.items():
        sizes[count].append(path)
    rows = [[place, f"{count:,}"] for count, paths in sizes.items() for place in paths_list(paths)]
    fitted = bool(activation and provenance.layers)
    tables = [stored_table(provenance.layers)] if fitted else []
    tables += [folded(["module", "parameters each"], rows, "modules")] if rows else []
    saved = config.get("modules_to_save")
    if isinstance(saved, list) and modules:  # peft adds names that heads may have
        saved = [name for name in dict.fromkeys(saved) if any(f".{name}." in f".{path}." for path in modules)]
    cls = str((config.get("auto_mapping") or {}).get("base_model_class"))  # recorded by peft without a task_type
    return CardParts(
        kind="adapter",
        name=METHODS.get(kind, kind),
        base=Base(config.get("base_model_name_or_path"), base_revision(config)),
        task=head_of(config.get("task_type") or cls).pipeline_tag,
        tags=[*provenance.tags, "peft", "adapter" if activation else kind.lower()],
        activation=activation,
        formulas=formulas(activation or ""),
        tables=tables,
        legend=legend(provenance.calibrated) if fitted else "",
        parameters=sum(modules.values()),
        size=weights.stat().st_size if weights else 0,
        targets=_names(config.get("target_modules")),
        saved=_names(saved) if saved else NOTHING,
        versions={name: config[f"{name}_version"] for name in ("hf_ortho", "peft") if config.get(f"{name}_version")},
    )


def _names(names: Any) -> Markdown:
    return Markdown(", ".join(paths_list(sorted(map(str, names))) if isinstance(names, list) else [code(str(names))]))
