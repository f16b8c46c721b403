"""Load and save checkpoints with their head and processor."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from ..errors import CheckpointError
from ..files import explain
from .adapter import ADAPTER_CONFIG, LABELS, adapter_config, adapter_labels, base_revision
from .patterns import check_patterns
from .revision import model_commit

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclasses.dataclass
class Checkpoint:
    """A model with its processors.

    Attributes:
        commit: the resolved 40-hex commit on the Hub, None for a folder.
        new_head: name of a head with new weights for the classes of a dataset; empty without one.
        merged: whether the model is a merged adapter.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    image_processor: Any | None
    commit: str | None
    new_head: str = ""
    merged: bool = False

    @property
    def processor(self):
        return self.tokenizer or self.image_processor


def load_checkpoint(name: str, *, revision: str | None = None, dtype: str = "auto", **overrides) -> Checkpoint:
    """Load a folder or a Hub model with the class named in its config, which keeps its head.

    A peft adapter is merged into its base model.

    Args:
        dtype: ``auto`` (the dtype of the checkpoint), ``float32``, ``bfloat16`` or ``float16``.
        overrides: passed to the config, for example ``num_labels``.

    Raises:
        CheckpointError: there is no checkpoint, or no transformers class for it.
    """
    check_place(name)
    try:
        adapter = adapter_config(name, revision)
        if adapter is not None:
            return _merged(name, adapter, revision, dtype, overrides)
        commit = model_commit(name, revision)
        revision = commit or revision  # a branch may move between two downloads
        config = AutoConfig.from_pretrained(name, revision=revision)
        architecture = (config.architectures or [""])[0]
        cls = getattr(transformers, architecture, None)
        if cls is None:
            raise CheckpointError(
                f"the config of {name} names the class {architecture or 'none'!r} under architectures, but "
                f"transformers {transformers.__version__} has no such class"
            )
        model = cls.from_pretrained(name, revision=revision, dtype=dtype, **overrides)
        tokenizer = processor_of(AutoTokenizer, TOKENIZER_FILES, name, revision)
        images = processor_of(AutoImageProcessor, IMAGE_FILES, name, revision)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400] or explain(error)
        raise CheckpointError(f"{name} cannot be loaded: {reason}") from error
    model.eval()
    model.config._commit_hash = commit  # for the provenance; transformers does not keep or write it
    vars(model.config).pop("auto_map", None)  # it refers to a file that is neither loaded nor saved again
    return Checkpoint(model, tokenizer, images, commit)


def _merged(name: str, adapter: dict, revision: str | None, dtype: str, overrides: dict) -> Checkpoint:
    from peft import PeftModel

    base, at = adapter["base_model_name_or_path"], base_revision(adapter)
    commit = model_commit(name, revision, ADAPTER_CONFIG)
    if labels := adapter_labels(name, commit or revision):
        overrides = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}, **overrides}
        overrides |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    try:
        check_place(base)
        if adapter_config(base, at) is not None:
            raise CheckpointError(f"{base} is an adapter too; save it merged, and use the merged model as the base")
        loaded = load_checkpoint(base, revision=at, dtype=dtype, **overrides)
    except CheckpointError as error:
        raise CheckpointError(f"{name} is an adapter; its base model {error}") from error
    check_patterns(adapter, [path for path, _ in loaded.model.named_modules()], f"{ADAPTER_CONFIG} of {name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(loaded.model, name, revision=commit or revision)
        if not hasattr(wrapped.base_model, "merge_and_unload"):
            raise CheckpointError(f"{name} is a peft adapter of type {adapter['peft_type']}, which cannot be merged")
        model: Any = wrapped.merge_and_unload(safe_merge=True)
    if missing := next((str(w.message) for w in caught if "missing adapter keys" in str(w.message)), None):
        raise CheckpointError(f"{name} is incomplete: {missing}")
    model.name_or_path = model.config._name_or_path = name
    model.config._commit_hash = commit
    return dataclasses.replace(loaded, model=model.eval(), commit=commit, merged=True)


def check_place(name: str) -> None:
    """Raise CheckpointError for a folder without a config, or a path that does not exist and is not a Hub name."""
    path = Path(name)
    configs = (path / CONFIG_NAME, path / ADAPTER_CONFIG)
    if path.is_file() or (path.is_dir() and not any(file.is_file() for file in configs)):
        raise CheckpointError(f"{name} is not a checkpoint: expected a folder with config.json and safetensors weights")
    if not path.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise CheckpointError(f"{name} does not exist")


def processor_of(auto, files: tuple[str, ...], name: str, revision: str | None) -> Any | None:
    """The tokenizer or image processor; None if the checkpoint has none."""
    present = (cached_file(name, f, revision=revision, _raise_exceptions_for_missing_entries=False) for f in files)
    if not any(present):
        return None
    try:
        return auto.from_pretrained(name, revision=revision)
    except ImportError as error:
        raise CheckpointError(f"the processor of {name} needs a missing package: {explain(error)}") from error
    except (OSError, ValueError):
        if auto is AutoTokenizer:
            raise
        return None  # the file describes another kind of processor, such as an audio feature extractor


def save_checkpoint(checkpoint: Checkpoint, folder: Path, state_dict: dict | None = None) -> None:
    """Write the model (with the tensors of ``state_dict``), its config and its processors to an existing folder."""
    checkpoint.model.save_pretrained(folder, state_dict=state_dict)
    if checkpoint.new_head and hasattr(checkpoint.model, "peft_config"):
        labels = json.dumps(checkpoint.model.config.id2label, indent=1)
        (folder / LABELS).write_text(labels + "\n", encoding="utf-8")
    for processor in (checkpoint.tokenizer, checkpoint.image_processor):
        if processor is not None:
            processor.save_pretrained(folder)
