"""Check that a name can refer to a checkpoint, and say what else a folder contains."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..errors import CheckpointError
from ..files import json_object
from .adapter import ADAPTER_CONFIG

READABLE = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# An ONNX graph instead of these weights, and its weights if one file cannot hold them; as in Optimum.
GRAPH, GRAPH_DATA = "onnx/model.onnx", "onnx/model.onnx_data"
FOREIGN = {  # weights of other formats, by the endings of their files
    ("tf_model.h5", "flax_model.msgpack"): "TensorFlow or Flax weights ({}): save them with PyTorch in transformers 4, "
    "AutoModel.from_pretrained(..., from_tf=True or from_flax=True).save_pretrained(...)",
    (".gguf",): "GGUF weights ({}): save them as safetensors in transformers, "
    "AutoModelForCausalLM.from_pretrained(..., gguf_file=...).save_pretrained(...)",
}


def check_place(name: str) -> None:
    """Check that a folder contains a checkpoint; a name that is not a path may be on the Hub.

    Raises:
        CheckpointError: the folder has no config, or only weights in another format; or it does not exist.
    """
    path = Path(name)
    if os.path.isfile(name):  # unlike Path.is_file, False for a name that is too long
        raise CheckpointError(f"{name} is not a checkpoint: expected a folder with config.json and safetensors weights")
    if os.path.isdir(name):
        files = {file.name for file in path.iterdir() if file.is_file()}
        if not files & {CONFIG_NAME, ADAPTER_CONFIG}:
            raise CheckpointError(f"{name} is not a checkpoint: {_content(path, files)}")
        if ADAPTER_CONFIG not in files and not files.intersection(READABLE) and (other := _foreign(files)):
            raise CheckpointError(f"{name} has only {other}")
        if ADAPTER_CONFIG not in files and has_graph(path):
            raise CheckpointError(f"{name} has only an ONNX graph ({GRAPH}): give the model that it was exported from")
    else:
        check_exists(name)


def has_graph(folder: Path) -> bool:
    """Whether a folder has an ONNX graph, and no weights that transformers reads."""
    return (folder / GRAPH).is_file() and not any((folder / name).is_file() for name in READABLE)


def check_exists(name: str) -> None:
    """Raise CheckpointError for a path that does not exist and cannot be the name of a Hub repository."""
    if not os.path.exists(name) and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise CheckpointError(f"{name} does not exist")


def _content(path: Path, files: set[str]) -> str:
    """What a folder without a config contains, and what would work instead."""
    kind = "it is a diffusers pipeline" if "model_index.json" in files else "it has no config.json"
    kind = "it is a sentence-transformers model in the old layout" if "modules.json" in files else kind
    models = sorted(config.parent.name for config in path.glob(f"*/{CONFIG_NAME}") if _is_model(config))
    if models:
        return f"{kind}; give one of its models: {', '.join(str(path / model) for model in models)}"
    if other := _foreign(files):
        return f"it has only {other}"
    return f"{kind}; expected a folder with config.json and safetensors weights"


def _foreign(files: set[str]) -> str:
    for endings, text in FOREIGN.items():
        if found := sorted(file for file in files if file.endswith(endings)):
            return text.format(found[0])
    return ""


def _is_model(config: Path) -> bool:
    """Whether a config is one of transformers, not of a pooling module or a diffusers model."""
    try:
        return "model_type" in json_object(config)
    except CheckpointError:
        return False
