"""Read peft adapters: their config and their activations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import ADAPTER_CONFIG_NAME as ADAPTER_CONFIG
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers.utils import cached_file

from ..activations import parse
from ..activations.base import SHARED
from ..errors import CheckpointError
from ..files import explain, json_object
from . import weights
from .provenance import Provenance, optional_text, unexpected
from .stored import stored_file
from .values import check_values

PEFT_TYPE = "HF_ORTHO"
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
    provenance_of(config, f"{ADAPTER_CONFIG} of {name}")
    return config


def provenance_of(config: dict, where: str) -> Provenance:
    """The provenance in an ``adapter_config.json``, after a check of the other values that are read here.

    Raises:
        CheckpointError: a value has the wrong type; the message names ``where`` and the key.
    """
    for key in ("peft_type", "revision", "task_type"):
        optional_text(config, key, where)
    classes = {} if config.get("auto_mapping") is None else config["auto_mapping"]
    if not isinstance(classes, dict):
        raise unexpected(f"{where}: auto_mapping", classes, "a dictionary")
    optional_text(classes, "base_model_class", f"{where}: auto_mapping")
    return Provenance.of_adapter(config, where)


def base_revision(config: dict) -> str | None:
    """The revision of the base model that an adapter was made for, if known."""
    return config.get("base_commit") or config.get("revision")


def adapter_auto_class(config: dict) -> str | None:
    """The auto class of transformers for the task of an adapter, if it is known: one of peft, or masked LM."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    if is_masked_lm((config.get("auto_mapping") or {}).get("base_model_class")):
        return "AutoModelForMaskedLM"
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.get("task_type")))
    return None if wrapper is None else wrapper.__name__.replace("PeftModel", "AutoModel", 1)


def is_masked_lm(name: str | None) -> bool:
    """Whether a class of transformers is a masked language model, for which peft has no task type."""
    return name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def is_text_classifier(name: str | None) -> bool:
    """Whether a class of transformers classifies texts, or predicts numbers for them."""
    return str(name).endswith("ForSequenceClassification")


def problem_type(outputs: int) -> str:
    """``problem_type`` of a model with a new head: with one output, it predicts a number."""
    return "regression" if outputs == 1 else "single_label_classification"


def adapter_labels(name: str, revision: str | None) -> dict[int, str] | None:
    """The classes of an adapter with a new head, otherwise None."""
    file = stored_file(name, LABELS, revision)
    if file is None:
        return None
    return labels_in(file)


def labels_in(file: str | Path) -> dict[int, str]:
    """The classes in a ``labels.json``, by their index.

    Raises:
        CheckpointError: the file is something else.
    """
    labels = json_object(file)
    if not labels or not all(re.fullmatch("[0-9]{1,9}", i) and isinstance(name, str) for i, name in labels.items()):
        raise CheckpointError(f"{file} does not hold the names of classes by their index")
    return {int(i): name for i, name in labels.items()}


def fixed_tensors(provenance: Provenance, module: str) -> dict[str, Tensor]:
    """The tensors of an activation that an adapter stores in its config: the tail slopes, and the domain.

    The domains of groups of channels are among the adapter's weights instead: text takes more than twice the bytes.
    """
    layer = provenance.layer(module)
    domain = {} if parse(str(provenance.activation)).groups > 1 else {"domain": tensor(layer.domain)}
    return domain | {"tail_slopes": tensor(layer.tail_slopes)}


def adapter_keys(name: str, revision: str | None) -> dict[str, dict[str, str]]:
    """The names of an adapter's tensors, by the path of their module in the base model and their name in it."""
    keys: dict[str, dict[str, str]] = {}
    for key in weights.shapes(str(cached_file(name, ADAPTER_WEIGHTS, revision=revision))):
        path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        keys.setdefault(path.removesuffix(SUFFIX), {})[leaf] = key
    return keys


def head_outputs(name: str, revision: str | None) -> int | None:
    """The outputs of the head that peft saves with an adapter of a text classifier; None if there is no such head."""
    if not has_safetensors(name, revision):
        return None
    shapes = weights.shapes(str(cached_file(name, ADAPTER_WEIGHTS, revision=revision)))
    heads = {key: shape for key, shape in shapes.items() if re.search(r"\.(score|classifier)(\.\w+)?\.weight$", key)}
    return heads[max(heads)][0] if heads else None  # of a dense layer and an output layer, out_proj


def has_safetensors(name: str, revision: str | None) -> bool:
    """Whether the weights of an adapter are stored as safetensors, not only pickled."""
    return bool(stored_file(name, ADAPTER_WEIGHTS, revision))


def adapter_tensors(name: str, config: Mapping, revision: str | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter by the path of their module in the base model.

    For an ``OrthoConfig`` adapter they include the tensors from its config.

    Raises:
        CheckpointError: the adapter is incomplete, or a value of an activation is not valid.
    """
    values = weights.tensors(str(cached_file(name, ADAPTER_WEIGHTS, revision=revision)))
    keys = adapter_keys(name, revision)
    tensors = {path: {leaf: values[key] for leaf, key in by_leaf.items()} for path, by_leaf in keys.items()}
    provenance = Provenance.of_adapter(config, f"{ADAPTER_CONFIG} of {name}")
    for layer in provenance.layers:
        if layer.module not in tensors:
            raise CheckpointError(f"{name} is incomplete: {ADAPTER_WEIGHTS} has no tensors for {layer.module}")
        tensors[layer.module] |= fixed_tensors(provenance, layer.module)
    for path, by_key in tensors.items():
        if all(key in by_key for key in SHARED):
            check_values(by_key, f"{path} of {name}")
    return tensors
