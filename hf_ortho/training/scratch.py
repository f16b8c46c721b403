"""Models with random weights from a config, with the activation and the processor of a recipe."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    IMAGE_PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.activations import ACT2FN

from ..activations import LearnableActivation, build
from ..activations.base import INITIALIZATIONS
from ..activations.registry import check_name
from ..checkpoints.custom_code import custom_class, load_config, references
from ..checkpoints.load import Checkpoint
from ..checkpoints.place import check_place
from ..checkpoints.processors import IMAGE_FILES, processor_of
from ..checkpoints.provenance import Provenance
from ..checkpoints.revision import model_commit
from ..conversion import ConversionReport, convert
from ..conversion.sites import find_sites, set_field
from ..conversion.widths import check_groups
from ..errors import CheckpointError, ConfigError
from ..files import explain
from ..tasks import SUPPORTED, TASKS, Task, data, head_of, named
from ..tasks.masked_lm import MASKED_LM
from ..tasks.stream import read, without_rows
from ..tasks.text_classification import TEXT_CLASSIFICATION
from ..tasks.tokenizer import bpe_tokenizer, byte_tokenizer, named_tokenizer
from ..text import suggestion
from .arguments import DataArguments, ModelArguments
from .distributed import fits_agree
from .tensor_parallel import sharding

logger = logging.getLogger("hf_ortho")

DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_DOCUMENTS = 10_000  # documents to learn byte-pair encoding from


def scratch_checkpoint(
    arguments: ModelArguments, data_arguments: DataArguments, seed: int
) -> tuple[Checkpoint, ConversionReport | None]:
    """A checkpoint with random weights, and the report of the fit if the activations were fitted.

    The weights depend on ``seed`` but not on the activation. If the config has a larger vocabulary than the tokenizer,
    the model does not generate the other tokens.

    Raises:
        HfOrthoError: an argument is invalid.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed}: must be between 0 and 2^32 - 1")
    if sharding():
        raise ConfigError("init scratch cannot be combined with tensor parallelism; use multi_gpu or fsdp2")
    config, commit = _config(arguments)
    cls = _class_of(config, arguments, commit)
    if cls is None:
        wanted = f"no model for task {arguments.task}" if arguments.task else "no supported task"
        raise ConfigError(f"model_type {config.model_type!r} has {wanted}; init scratch supports: {SUPPORTED}")
    tokenizer = image_processor = None
    if cls.main_input_name == "input_ids":
        task = cast(Task, head_of(cls.__name__))
        # An encoder needs a pad token of its own, and a separator between two texts.
        masks = task.masks_tokens or (task is TEXT_CLASSIFICATION and MASKED_LM.model_class(config) is not None)
        tokenizer = _tokenizer(arguments, data_arguments, commit, task, masks)
        if arguments.tokenizer:
            config.vocab_size = max(len(tokenizer), cast(dict, arguments.config_overrides).get("vocab_size", 0))
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            for key in ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id") if masks else ():
                if hasattr(config, key):
                    setattr(config, key, getattr(tokenizer, key))
    else:
        image_processor = _image_processor(arguments, config, commit)
    model, report = build_model(cls, config, arguments.activation, arguments.activation_init, seed)
    model.config._commit_hash = commit
    size = config.get_text_config().vocab_size if tokenizer is not None else 0
    if tokenizer is not None and len(tokenizer) > size:
        raise ConfigError(f"vocab_size {size} of the config is less than the {len(tokenizer)} tokens of the tokenizer")
    if tokenizer is not None and len(tokenizer) < size and model.generation_config is not None:  # a padded embedding
        model.generation_config.suppress_tokens = list(range(len(tokenizer), size))
    if arguments.dtype not in DTYPES:
        raise ConfigError(f"dtype {arguments.dtype!r}: must be one of {', '.join(DTYPES)}")
    torch.nn.Module.to(model, DTYPES[arguments.dtype])
    return Checkpoint(model, tokenizer, image_processor, commit), report


def _class_of(config: PreTrainedConfig, arguments: ModelArguments, commit: str | None) -> type[PreTrainedModel] | None:
    """The class of the first task that has one for this config, in transformers or in the code beside the config."""
    custom = references(getattr(config, "auto_map", None)) if arguments.trust_remote_code else {}
    for task in (named(arguments.task),) if arguments.task else TASKS:
        if arguments.model and task.auto_class in custom:
            return custom_class(arguments.model, commit, task.auto_class, custom[task.auto_class])
        if (cls := task.model_class(config)) is not None:
            return cls
    return None


def build_model(
    cls: type[PreTrainedModel], config: PreTrainedConfig, activation: str | None, init: str, seed: int
) -> tuple[PreTrainedModel, ConversionReport | None]:
    """Build a ``cls`` from ``config`` with ``activation``, a name in ``ACT2FN`` (None: unchanged).

    ``init`` initializes a learnable activation: ``paper``, ``unit``, or a name in ``ACT2FN`` to fit it to, together in
    all processes. The second result is the report of this fit, or None.
    """

    def fresh(device: str = "cpu") -> PreTrainedModel:
        set_seed(seed)
        try:
            with torch.device(device):
                model = cls(config)
        except (TypeError, ValueError, IndexError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"{cls.__name__} cannot be built with this config: {explain(error)}") from error
        for path, module in model.named_modules():
            if isinstance(module, LearnableActivation):
                check_groups(model, [path], module.groups)
        return model

    if activation is None:
        return fresh(), None
    check_name(activation)
    learnable = isinstance(ACT2FN[activation], LearnableActivation)
    fitted = learnable and init not in INITIALIZATIONS
    if fitted and init not in ACT2FN:
        raise ConfigError(
            f"activation_init {init!r}: must be one of {', '.join(INITIALIZATIONS)}, or a name in ACT2FN to fit, "
            "such as gelu"
        )
    for site in find_sites(fresh("meta"))[0]:
        set_field(config, site.field, site.prefix + (init if fitted else activation))
    model = fresh()
    report = None
    if fitted:
        with fits_agree():
            report = convert(model, activation)
    for module in model.modules() if learnable and not fitted else ():
        if isinstance(module, LearnableActivation):
            module.load_state_dict(build(module.name, init).state_dict())
    if learnable:
        provenance = dataclasses.replace(Provenance.of(model.config), activation=activation, init=init)
        model.config.hf_ortho = provenance.to_dict()
    return model, report


def _config(arguments: ModelArguments) -> tuple[PreTrainedConfig, str | None]:
    if bool(arguments.model) == bool(arguments.model_type):
        raise ConfigError(
            "init scratch: give either model (a folder or Hub model with a config.json) or model_type, such as gpt2"
        )
    commit, overrides = None, cast(dict, arguments.config_overrides)
    try:
        if arguments.model:
            check_place(arguments.model)
            commit = model_commit(arguments.model, arguments.model_revision)
            revision = commit or arguments.model_revision
            config = load_config(arguments.model, revision, arguments.trust_remote_code)
            stored = PreTrainedConfig.get_config_dict(arguments.model, revision=revision)[0]
            stored.pop("hf_ortho", None)  # the provenance of the original weights
        else:
            config, stored = AutoConfig.for_model(str(arguments.model_type)), {}
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the config of {arguments.model or arguments.model_type}: {explain(error)}") from error
    known = {*config.to_dict(), *config.attribute_map}
    for key in overrides:
        if key not in known:
            raise ConfigError(f"config_overrides: {type(config).__name__} has no {key!r}{suggestion(key, known)}")
    try:
        return type(config).from_dict({**stored, **overrides}), commit  # some fields are derived from others
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"config_overrides {overrides}: {explain(error)}") from error


def _tokenizer(arguments: ModelArguments, data_arguments: DataArguments, commit: str | None, task: Task, masks: bool):
    name = arguments.tokenizer
    if name == "bpe":
        if not arguments.vocab_size >= (least := len(byte_tokenizer(masks))):
            raise ConfigError(f"vocab_size {arguments.vocab_size}: a byte-level tokenizer needs at least {least}")
        logger.info(f"Learning a tokenizer of {arguments.vocab_size} tokens from {data_arguments.dataset}")
        return bpe_tokenizer(_texts(data_arguments, task), arguments.vocab_size, masks)
    place = name or arguments.model
    if not place:
        raise ConfigError("tokenizer is missing; give bytes, bpe (learned from the dataset), a folder or a Hub name")
    revision = commit if place == arguments.model else None
    return named_tokenizer(place, revision, arguments.trust_remote_code, masks=masks)


def _texts(arguments: DataArguments, task: Task):
    """The first documents of the training split."""
    name = str(arguments.dataset)
    options: dict[str, Any] = {"config_name": arguments.dataset_config, "revision": arguments.dataset_revision}
    splits = data.load(name, streaming=True, **options)
    split = splits[data.pick(splits, arguments.train_split, data.TRAIN, name)]
    columns = task.text_columns(without_rows(split, name), arguments, name)
    return (row[column] or "" for row in read(split.take(TOKENIZER_DOCUMENTS), name) for column in columns)


def _image_processor(arguments: ModelArguments, config: PreTrainedConfig, commit: str | None):
    options = cast(dict, arguments.image_processor_overrides)
    if arguments.model:
        trust = arguments.trust_remote_code
        processor = processor_of(AutoImageProcessor, IMAGE_FILES, arguments.model, commit, trust)
        if processor is None:
            raise CheckpointError(f"{arguments.model} has no image processor; give model_type instead of model")
        cls: Any = type(processor)
        options = {**processor.to_dict(), **options}
    else:
        backends = IMAGE_PROCESSOR_MAPPING.get(type(config), None)
        if not backends:
            raise ConfigError(f"model_type {config.model_type!r} has no image processor; give a model to take it from")
        cls = backends["pil"] if isinstance(backends, dict) else backends[0]
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"image_processor_overrides {arguments.image_processor_overrides}: {error}") from error
