"""The files of a folder to push to the Hub: a complete model or adapter, without training state."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from transformers import AutoConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoints.activations import load_activations
from ..checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_tensors
from ..checkpoints.custom_code import references
from ..checkpoints.provenance import Provenance
from ..checkpoints.weights import shapes, weight_map
from ..errors import CheckpointError, ConfigError
from ..files import MANIFEST, TRAINING_MANIFEST, explain, json_object

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
STATES = (TRAINER_STATE_NAME, TRAINING_MANIFEST)
LEFT_OUT = (".", f"{PREFIX_CHECKPOINT_DIR}-")  # prefixes of folders
FOLDERS = ("last-checkpoint", "__pycache__")
UNFINISHED = (".tmp", ".lock", ".incomplete", ".draft")


@dataclasses.dataclass(frozen=True)
class Contents:
    """A folder that can be pushed.

    Attributes:
        adapter: whether the folder contains an adapter but no model.
        files: files to upload, as paths in the repository.
        left_out: files to leave out: hidden files, pickles, training checkpoints and states. Folders end in ``/``. The
            manifest of ``OutputFolder`` is in neither list.
    """

    adapter: bool
    files: list[str]
    left_out: list[str]


def contents_of(folder: str | os.PathLike) -> Contents:
    """Check that a folder contains a complete model or adapter, and sort its files.

    A model has a config that transformers can read, and all weights as safetensors. A peft adapter has
    ``adapter_config.json`` and ``adapter_model.safetensors``. Only the headers of the weights are read.

    Raises:
        CheckpointError: the folder contains neither, or a file is missing, truncated, or lacks an entry that another
            file lists.
    """
    place = Path(folder)
    if not place.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a folder with a model or an adapter")
    adapter = (place / ADAPTER_CONFIG).is_file()
    model = (place / CONFIG_NAME).is_file()
    if not adapter and not model:
        raise CheckpointError(
            f"{folder} contains neither a model nor an adapter: expected {CONFIG_NAME} with {SAFE_WEIGHTS_NAME}, or "
            f"{ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}"
        )
    if adapter:
        _check_adapter(place)
    if model:
        _check_model(place)
    return Contents(adapter and not model, *_sort(place))


def _check_model(folder: Path) -> None:
    code = references(json_object(folder / CONFIG_NAME).get("auto_map"))
    for module in sorted({path.partition(".")[0] for path in code.values() if "--" not in path}):
        if not (folder / f"{module}.py").is_file():
            raise CheckpointError(f"{folder} is incomplete: {module}.py, which {CONFIG_NAME} names, is missing")
    try:
        if "AutoConfig" not in code:  # otherwise only code could read it, which a push does not run
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds
        raise CheckpointError(f"{folder / CONFIG_NAME} cannot be read: {explain(error)}") from error
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if not single.is_file() and not index.is_file():
        raise CheckpointError(f"{folder} is incomplete: it has a config but neither {single.name} nor {index.name}")
    if single.is_file():
        shapes(single)
    if index.is_file():
        places = weight_map(index)
        for shard in sorted(set(places.values())):
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder} is incomplete: {shard}, which {index.name} lists, is missing")
            missing = {key for key, file in places.items() if file == shard} - shapes(folder / shard).keys()
            if missing:
                raise CheckpointError(f"{folder} is incomplete: {shard} lacks {min(missing)}, which {index.name} lists")
    try:
        load_activations(str(folder))
    except ConfigError as error:  # it has none
        if Provenance.of(json_object(folder / CONFIG_NAME), str(folder)).layers:
            raise CheckpointError(
                f"{folder} is incomplete: its config names learnable activations, but its weights have none"
            ) from error


def _check_adapter(folder: Path) -> None:
    config = json_object(folder / ADAPTER_CONFIG)
    if "peft_type" not in config:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not name a peft_type")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is incomplete: it has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
    adapter_tensors(str(folder), config, None)  # checks the values of activations
    names = shapes(folder / ADAPTER_WEIGHTS)
    for layer in Provenance.of_adapter(config, str(folder / ADAPTER_CONFIG)).layers:
        if not any(f".{layer.module}." in name for name in names):
            raise CheckpointError(
                f"{folder} is incomplete: {ADAPTER_WEIGHTS} lacks {layer.module}, which {ADAPTER_CONFIG} lists"
            )


def _sort(folder: Path) -> tuple[list[str], list[str]]:
    """The paths to upload and the paths to leave out."""
    files: list[str] = []
    left_out: list[str] = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        for name in [name for name in folders if name.startswith(LEFT_OUT) or name in FOLDERS]:
            folders.remove(name)
            left_out.append(f"{(here / name).relative_to(folder).as_posix()}/")
        for name in filter(lambda name: name != MANIFEST, names):
            path = (here / name).relative_to(folder).as_posix()
            excluded = name.startswith(".") or name in STATES or name.lower().endswith(PICKLES + UNFINISHED)
            (left_out if excluded else files).append(path)
            if not excluded and not (here / name).is_file():
                raise CheckpointError(f"{folder} is incomplete: {path} is a link to a missing file")
    return sorted(files), sorted(left_out)
