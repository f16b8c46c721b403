"""Load and save checkpoints with their head and processor."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..activations import LearnableActivation
from ..errors import CheckpointError, FitError, HfOrthoError
from ..partitioned import is_partitioned
from .activations import stored_tensors
from .adapter import (
    ADAPTER_CONFIG,
    LABELS,
    adapter_auto_class,
    adapter_config,
    adapter_labels,
    adapter_tensors,
    base_revision,
    has_safetensors,
    head_outputs,
    is_masked_lm,
    is_text_classifier,
    problem_type,
)
from .carry import Source, carry
from .custom_code import load_config
from .keys import check_keys
from .limits import limited, model_shapes
from .listing import SENTENCE
from .model_class import encoder_class, model_class
from .patterns import check_patterns
from .place import check_place
from .processors import IMAGE_FILES, TOKENIZER_FILES, processor_of
from .provenance import Provenance
from .revision import model_commit
from .values import check_values

logger = logging.get_logger("hf_ortho")


@dataclasses.dataclass
class Checkpoint:
    """A model with its processors.

    Attributes:
        commit: the resolved 40-hex commit on the Hub, None for a folder.
        new_modules: paths of the modules with new weights: a head for the task or for the classes of a dataset.
        merged: whether the model is a merged adapter.
        source: where the model was loaded from (for a merged adapter, its base model): ``save_checkpoint`` carries over
            its other files. None for a new model.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    image_processor: Any | None
    commit: str | None
    new_modules: tuple[str, ...] = ()
    merged: bool = False
    source: Source | None = None

    @property
    def processor(self):
        return self.tokenizer or self.image_processor


def load_checkpoint(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    auto_classes: Sequence[str] = ("AutoModel",),
    auto_class: str | None = None,
    **overrides,
) -> Checkpoint:
    """Load a folder or a Hub model with the class named in its config, which keeps its head.

    A peft adapter is merged into its base model. No weight is initialized at random: the file must contain all tensors
    of the model, except a head that ``overrides`` replace or that ``auto_class`` adds.

    Args:
        dtype: ``auto`` (the dtype of the checkpoint), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: whether code in the repository may run, as in transformers. Without it, a model or processor
            that is defined by such code is an error; the user is never asked.
        auto_classes: if the config names no class, the first of these that knows the config loads the model.
        auto_class: loads the model instead of the class in the config. A head that the weights lack is new.
        overrides: passed to the config, for example ``num_labels``, with ``ignore_mismatched_sizes`` for a new head.

    Raises:
        CheckpointError: there is no checkpoint, or no transformers class for it; it is incomplete; it needs code that
            may not run; or a value of an activation is not valid.
    """
    check_place(name)
    new_head = replaced_head = overrides.pop("ignore_mismatched_sizes", False)
    try:
        adapter = adapter_config(name, revision)
        if adapter is not None:
            options = {"trust_remote_code": trust_remote_code, "auto_classes": auto_classes, **overrides}
            options |= {"auto_class": auto_class}
            options |= {"ignore_mismatched_sizes": True} if new_head else {}
            return _merged(name, adapter, revision, dtype=dtype, **options)
        commit = model_commit(name, revision)
        at = commit or revision  # a branch may move between two downloads
        config = load_config(name, at, trust_remote_code)
        cls = model_class(name, at, config, trust_remote_code, auto_classes, auto_class)
        another = auto_class is not None and cls.__name__ not in (config.architectures or [])
        new_head |= another
        stored = stored_tensors(name, at)
        _check_activations(name, stored or {})  # as stored: transformers converts any dtype to that of the model
        options = {"trust_remote_code": trust_remote_code, "ignore_mismatched_sizes": True, **overrides}
        options |= {"revision": at, "dtype": dtype, "output_loading_info": True}
        with limited(model_shapes(name, at), f"the config of {name}"), _same_numbers(not new_head):
            model, info = _from_pretrained(cls, name, options)
            if auto_class is None and (encoder := encoder_class(name, at, model, info)):
                model, info = _from_pretrained(encoder, name, options)
        if new_head and not replaced_head:
            info["missing_keys"] -= _fit_new(model, info["missing_keys"])
        new_modules = check_keys(name, model, info, new_head=new_head, replaced_head=replaced_head)
        if stored is None:
            logger.warning(f"note: the weights of {name} are pickled; only tensors are read, and no code in them runs")
            _check_activations(name, _activations_of(model))
        tokenizer = processor_of(AutoTokenizer, TOKENIZER_FILES, name, at, trust_remote_code)
        images = processor_of(AutoImageProcessor, IMAGE_FILES, name, at, trust_remote_code)
    except HfOrthoError:
        raise
    except Exception as error:  # whatever the libraries raise for such files
        raise CheckpointError(f"{name} cannot be loaded: {_reason(error)}") from error
    model.eval()
    model.config._commit_hash = commit  # for the provenance; transformers does not keep or write it
    if not type(model).is_remote_code():
        vars(model.config).pop("auto_map", None)  # it refers to a file that is neither loaded nor saved again
    return Checkpoint(
        model, tokenizer, images, commit, new_modules, source=Source(name, commit, SENTENCE if another else "")
    )


@contextlib.contextmanager
def _same_numbers(seeded: bool) -> Iterator[None]:
    """With ``seeded``, whatever is initialized at random, such as a missing pooler, is the same each time."""
    with torch.random.fork_rng(devices=[], enabled=seeded):
        if seeded:
            torch.manual_seed(0)
        yield


def _from_pretrained(cls: Any, name: str, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and its loading info, without the warning about missing activations, which are an error here."""
    logger.disabled = True
    try:
        return cls.from_pretrained(name, **options)
    finally:
        logger.disabled = False


def _fit_new(model: PreTrainedModel, missing: Set[str]) -> set[str]:
    """Fit the activations of a new head to the one that those of the base model replaced; returns their keys."""
    sources, fitted = {*Provenance.of(model.config).source_activations.values()}, set()
    for path, module in model.named_modules():
        if len(sources) == 1 and isinstance(module, LearnableActivation) and not is_partitioned(module.domain):
            keys = {f"{path}.{name}" for name, _ in module.named_parameters()}
            with contextlib.suppress(FitError):  # of a source that is not in transformers
                if keys <= missing:
                    if not module.domain.is_meta:  # FSDP sends the values of the first process to the others
                        module.fit(*sources)
                    fitted |= keys
    return fitted


def _activations_of(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """The tensors of each learnable activation, by its path."""
    modules = ((path, m) for path, m in model.named_modules() if isinstance(m, LearnableActivation))
    return {path: m.whole().state_dict() for path, m in modules}


def _check_activations(name: str, activations: Mapping[str, Mapping[str, Tensor]]) -> None:
    for path, tensors in activations.items():
        check_values(tensors, f"{path} of {name}")


def _reason(error: Exception) -> str:
    """The message of an error on one line; with its type if the message alone would say little."""
    if isinstance(error, UnpicklingError):  # torch suggests to run the code
        return "its pickled weights contain other objects than tensors, which are not read; save them as safetensors"
    text = " ".join(str(error).split())[:400]
    return (
        text if text and isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"
    )


def _merged(name: str, adapter: dict, revision: str | None, **options) -> Checkpoint:
    from peft import PeftModel

    base, at = adapter["base_model_name_or_path"], base_revision(adapter)
    commit = model_commit(name, revision, ADAPTER_CONFIG)
    auto_class, outputs = adapter_auto_class(adapter), None
    masked = auto_class == "AutoModelForMaskedLM"
    if labels := adapter_labels(name, commit or revision):
        outputs = len(labels)
        options = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}, **options}
        options["problem_type"] = problem_type(outputs)
    elif auto_class == "AutoModelForSequenceClassification":  # of peft alone, which saves the head without names
        outputs = head_outputs(name, commit or revision)
    if outputs:
        options |= {"num_labels": outputs, "ignore_mismatched_sizes": True}
    if outputs or masked:
        options["auto_class"] = options.get("auto_class") or auto_class
    try:
        check_place(base)
        if adapter_config(base, at) is not None:
            raise CheckpointError(f"{base} is an adapter too; save it merged, and use the merged model as the base")
        loaded = load_checkpoint(base, revision=at, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{name} is an adapter; its base model {error}") from error
    check_patterns(adapter, [path for path, _ in loaded.model.named_modules()], f"{ADAPTER_CONFIG} of {name}")
    stored = None
    if has_safetensors(name, commit or revision):
        tensors = adapter_tensors(name, adapter, commit or revision)  # checks the values, as stored
        stored = [tuple(value.shape) for by_key in tensors.values() for value in by_key.values()]
    with warnings.catch_warnings(record=True) as caught, limited(stored, f"{ADAPTER_CONFIG} of {name}"):
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(loaded.model, name, revision=commit or revision)
        if not hasattr(wrapped.base_model, "merge_and_unload"):
            raise CheckpointError(f"{name} is a peft adapter of type {adapter['peft_type']}, which cannot be merged")
        model: Any = wrapped.merge_and_unload(safe_merge=True)
    if missing := next((str(w.message) for w in caught if "missing adapter keys" in str(w.message)), None):
        raise CheckpointError(f"{name} is incomplete: {missing}")
    _check_activations(name, _activations_of(model))
    model.name_or_path = model.config._name_or_path = name
    model.config._commit_hash = commit
    tokenizer = processor_of(AutoTokenizer, TOKENIZER_FILES, name, commit or revision, options["trust_remote_code"])
    if tokenizer is not None and tokenizer.pad_token is not None and is_text_classifier(type(model).__name__):
        use_pad_token(model, tokenizer)  # the base model may have none
    new = () if outputs or masked else loaded.new_modules  # the adapter has the head of its classes
    parts = {"model": model.eval(), "tokenizer": tokenizer or loaded.tokenizer}
    return dataclasses.replace(loaded, **parts, commit=commit, merged=True, new_modules=new)


def use_pad_token(model: PreTrainedModel, tokenizer: Any) -> None:
    """Set the pad token of a model that has none, or that classifies at the last other token, to its tokenizer's."""
    config: Any = model.config.get_text_config()
    if config.pad_token_id is None or hasattr(model, "score"):  # the head of decoders, whatever their architecture
        config.pad_token_id = tokenizer.pad_token_id


def save_checkpoint(checkpoint: Checkpoint, folder: Path, state_dict: dict | None = None) -> None:
    """Write the model (with the tensors of ``state_dict``), its config and its processors to an existing folder.

    The folder of a full model also gets the other files of its source, see ``carry``.
    """
    checkpoint.model.save_pretrained(folder, state_dict=state_dict)
    if checkpoint.new_modules:
        save_labels(checkpoint.model, folder)
    save_other_files(checkpoint, folder)


def save_other_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the processors of a model to an existing folder, and the other files of its source, see ``carry``."""
    for processor in (checkpoint.tokenizer, checkpoint.image_processor):
        if processor is not None:
            processor.save_pretrained(folder)
    if checkpoint.source is not None and not (folder / ADAPTER_CONFIG).is_file():
        carry(checkpoint.source, folder)  # an adapter needs none of them: its base model has them


def save_labels(model: PreTrainedModel, folder: Path) -> None:
    """Write the classes of the new head of an adapter beside it. A full model has them in its config."""
    base = getattr(model, "get_base_model", lambda: None)()  # the model inside a peft adapter
    if base is not None and not is_masked_lm(type(base).__name__):
        (folder / LABELS).write_text(json.dumps(model.config.id2label, indent=1) + "\n", encoding="utf-8")
