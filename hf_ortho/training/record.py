"""The settings saved with each training checkpoint, compared with those of the training that resumes from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..activations.registry import is_learnable, named
from ..conversion.sites import activation_fields
from ..errors import ConfigError
from ..files import TRAINING_RECIPE, json_object
from ..tasks.stream import Stream
from ..tasks.tokens import BLOCK
from .adapters import FITTED
from .arguments import Recipe

logger = logging.getLogger("hf_ortho")

REQUIRED = ("activation", "train", "adapter", "optim", "activation_natural_steps", "param_groups")  # and those of LoRA
KEPT = ("learning_rate", "activation_learning_rate", "weight_decay")  # saved with the states of the optimizer
DATA = ("dataset", "dataset_config", "dataset_revision", "train_split", "block_size", "streaming", "max_train_samples")
MASKS = ("mask_probability", "whole_word_mask")
TRAINING = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "learning_rate", "weight_decay"),
    *("max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "optim"),
)


def record_of(recipe: Recipe, model: PreTrainedModel, train: Dataset | Stream) -> dict[str, Any]:
    """The settings that determine the weights after a training, as JSON values, and a digest of some samples."""
    optimizer = recipe.optimizer_arguments()
    names = {source for _, _, source in activation_fields(model.config)}
    if recipe.model.adapter and recipe.model.train in FITTED:  # the model is not converted
        names = {str(recipe.model.activation)}
    record: dict[str, Any] = {
        "activation": ", ".join(sorted(map(_canonical, names))),
        **{key: getattr(recipe.model, key) for key in ("model", "train", "adapter", "dtype")},
        **{key: getattr(recipe.data, key) for key in (*DATA, *MASKS)},
        **{key: getattr(recipe.training, key) for key in TRAINING},
        **{key: getattr(optimizer, key) for key in ("activation_natural_steps", "activation_gradient_scale")},
        "domain_penalty": optimizer.domain_penalty,
        "activation_learning_rate": optimizer.activation_learning_rate,
        "param_groups": optimizer.param_groups,
        **dataclasses.asdict(recipe.augmentation),
    }
    for key in ("model", "dataset"):  # Trainer may push checkpoints, and the path of a file concerns nobody else
        if record[key] is not None and Path(record[key]).exists():
            record[key] = Path(record[key]).absolute().name
    if recipe.model.train.startswith("lora"):
        record |= dataclasses.asdict(recipe.lora)
    if isinstance(train, Stream):  # its order depends on them
        record["dataloader_num_workers"] = recipe.training.dataloader_num_workers
        record["dispatch_batches"] = getattr(recipe.training.accelerator_config, "dispatch_batches", None) is not False
    if isinstance(train, Dataset):
        record |= {"samples": len(train), "digest": _digest(train)}
    plain = json.loads(json.dumps(record, default=str))
    return plain | {"optim": plain["optim"].removesuffix("_fused")}  # the states are the same


def _digest(train: Dataset) -> str:
    """SHA-256 of the first, the middle and the last sample."""
    numbers = sorted({0, len(train) // 2, len(train) - 1})
    if train.column_names == [BLOCK]:  # of a token cache
        rows = [{key: ids.tolist() for key, ids in train[i].items()} for i in numbers]
    else:
        rows = train.with_format("arrow")[numbers].to_pylist()
    return hashlib.sha256(repr(_without_folders(rows)).encode()).hexdigest()


def _without_folders(value: Any) -> Any:
    """The value with the names of files in place of their paths, which another machine may not have."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, dict):
        path = {"path": Path(value["path"]).name} if isinstance(value.get("path"), str) else {}
        return {key: _without_folders(item) for key, item in (value | path).items()}
    return value


def _canonical(name: str) -> str:
    return named(name) if is_learnable(name) else name


def check_resumed(checkpoint: Path, model: PreTrainedModel, record: dict[str, Any], activation: str | None) -> None:
    """Compare a checkpoint with the training that resumes from it; log a note if this cannot continue it exactly.

    Args:
        activation: the activation of the adapter to train, if any.

    Raises:
        ConfigError: the states of the checkpoint belong to another activation, policy, adapter or optimizer.
    """
    mine = {field: _canonical(source) for field, _, source in activation_fields(model.config)}
    for field, name in _saved_activations(checkpoint, mine, activation).items():
        if name != (asked := mine.get(field) or _canonical(str(activation))):
            raise _other(checkpoint, field, name, asked)
    file = checkpoint / TRAINING_RECIPE
    if not file.is_file():  # of an earlier version, or a plain Trainer
        return
    saved = {"param_groups": []} | json_object(file)
    differing = [key for key in saved.keys() & record.keys() if saved[key] != record[key]]
    for key in (*REQUIRED, *(key for key in record if key.startswith("lora_"))):
        if key in differing:
            raise _other(checkpoint, key, saved[key], record[key])
    changes = [
        f"{key} {saved[key]!r}, now {record[key]!r}" + (", which the optimizer does not adopt" if key in KEPT else "")
        for key in record
        if key in differing and key != "digest" and not (key in DATA and _same(saved, record, "digest"))
    ]
    if "digest" in differing and not changes:
        changes = ["other training samples"]
    if changes:
        logger.warning(
            f"note: {checkpoint.name} was saved with {'; '.join(changes)}: the result differs from that of a training "
            "that was not interrupted"
        )


def _same(saved: dict[str, Any], record: dict[str, Any], key: str) -> bool:
    return key in saved and saved[key] == record.get(key)


def _saved_activations(checkpoint: Path, fields: dict[str, str], activation: str | None) -> dict[str, str]:
    """The activation names in the configs of the checkpoint, by field of the model's config, or as ``activation``."""
    config, adapter = checkpoint / "config.json", checkpoint / "adapter_config.json"
    found: dict[str, Any] = {}
    if config.is_file():
        stored = json_object(config)
        for field in fields:
            value: Any = stored
            for part in field.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            found[field] = value
    elif activation and adapter.is_file():
        found["activation"] = json_object(adapter).get("activation")
    return {field: _canonical(name.rpartition("-")[2]) for field, name in found.items() if isinstance(name, str)}


def _other(checkpoint: Path, key: str, saved: Any, asked: Any) -> ConfigError:
    return ConfigError(
        f"resume_from_checkpoint {checkpoint}: saved with {key} {saved!r}, not {asked!r}; use {saved!r} to resume, or "
        "another output_dir"
    )
