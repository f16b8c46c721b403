"""Assemble the checkpoint, the samples and the Trainer of a recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.activations import ACT2FN
from transformers.distributed.fsdp import is_fsdp_enabled

from ..activations import LearnableActivation
from ..checkpoints.load import Checkpoint, load_checkpoint
from ..conversion import ConversionReport, convert
from ..conversion.sites import find_sites
from ..errors import ConfigError, HfOrthoError
from ..files import explain
from ..partitioned import full_size
from ..recompute import fuse_mlp
from ..tasks import TASKS, named, of
from ..tasks.samples import batches, load_splits
from ..tasks.stream import Stream
from ..tasks.tokenizer import use_tokenizer
from .adapters import FITTED, add_adapter, add_lora
from .arguments import ModelArguments, OptimizerArguments, Recipe
from .augment import Epochs, augment, check_augmentation
from .distributed import fits_agree, fsdp_version
from .evaluation import make_trainer
from .groups import absent_names, assign
from .logger import ActivationLogger
from .penalty import DomainPenalty
from .policies import LEARNABLE, set_trainable
from .scratch import scratch_checkpoint
from .tensor_parallel import reduce_activation_gradients, sharding
from .trainer import ActivationTrainer, check_optimizer

logger = logging.getLogger("hf_ortho")


def assemble(recipe: Recipe) -> tuple[Checkpoint, Dataset | Stream, Dataset | None, ConversionReport | None]:
    """The converted or new checkpoint, the training and evaluation samples, and the report of the activations."""
    arguments, training = recipe.model, recipe.training
    if arguments.init == "scratch":
        checkpoint, report = scratch_checkpoint(arguments, recipe.data, training.seed)
    else:
        place, report = str(arguments.model), None
        if arguments.tokenizer == "bpe":
            raise ConfigError("tokenizer bpe: learned from the dataset, only with init scratch")
        options = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code, **sharding()}
        if arguments.task:
            options["auto_class"] = named(arguments.task).auto_class
            set_seed(training.seed)  # of a new head
        logger.info(f"Loading {place}")
        auto_classes = [task.auto_class for task in TASKS]
        checkpoint = load_checkpoint(place, revision=arguments.model_revision, auto_classes=auto_classes, **options)
        use_tokenizer(checkpoint, arguments.tokenizer, trust_remote_code=arguments.trust_remote_code)
    # The other processes read its cache. For a token cache they wait at a file lock, as a barrier would time out.
    tokenizes = checkpoint.tokenizer is not None and not recipe.data.streaming
    logger.info(f"{'Tokenizing' if tokenizes else 'Preparing'} {recipe.data.dataset}")
    first = training.main_process_first(desc="preparing the data")
    with contextlib.nullcontext() if recipe.data.tokenize else first:
        seed = training.seed if training.data_seed is None else training.data_seed
        train, held_back = load_splits(checkpoint, recipe.data, seed)
    if arguments.init != "scratch" and not (arguments.adapter and arguments.train in FITTED):
        report = _convert_first(checkpoint, arguments, train)
    return checkpoint, train, held_back, report


def _convert_first(
    checkpoint: Checkpoint, arguments: ModelArguments, train: Dataset | Stream
) -> ConversionReport | None:
    """Convert the model unless it already has the activation, learnable or not."""
    name, model = arguments.activation, checkpoint.model
    if not name:
        return None
    present = {site.source for site in find_sites(model)[0]}
    learnable = isinstance(ACT2FN[name], LearnableActivation)
    if present == {name if not learnable else ACT2FN[name].name}:
        return None
    if arguments.adapter:
        raise ConfigError(
            f"adapter: train {arguments.train!r} needs a base model saved with {name}, but {model.name_or_path} has "
            f"{', '.join(sorted(present))}; convert it with hf-ortho convert and give the result as model"
        )
    if not learnable:
        raise ConfigError(
            f"activation {name!r}: {model.name_or_path} has {', '.join(sorted(present))}, which can only be "
            "converted to a learnable activation, such as hermite_8"
        )
    if is_fsdp_enabled():  # transformers then reads the weights in the main process only
        raise ConfigError(
            f"activation {arguments.activation}: the fit needs the weights in all processes; set "
            "fsdp_cpu_ram_efficient_loading to false, or convert the model beforehand"
        )
    with fits_agree():
        return convert(model, name, calibration=_calibration(checkpoint, arguments, train))


def build_trainer(
    recipe: Recipe,
    checkpoint: Checkpoint,
    train: Dataset | Stream,
    held_back: Dataset | None,
    resume: str | None = None,
) -> tuple[ActivationTrainer, int]:
    """The Trainer of a recipe, with frozen parameters as configured, and the number of trainable parameters.

    ``resume`` is the checkpoint to resume from.

    Raises:
        ConfigError: an argument is incompatible with the model or the data.
    """
    arguments, training = recipe.model, recipe.training
    if arguments.adapter or arguments.train.startswith("lora"):
        if sharding():
            setting = f"train {arguments.train!r}" + (" with adapter" if arguments.adapter else "")
            raise ConfigError(f"{setting} cannot be combined with tensor parallelism; use multi_gpu or fsdp2")
        checkpoint.model = cast(PreTrainedModel, _wrap(checkpoint, recipe, train, resume))
        trainable = sum(full_size(p) for p in checkpoint.model.parameters() if p.requires_grad)
    else:
        trainable = set_trainable(checkpoint.model, arguments.train, checkpoint.new_modules)
    reduce_activation_gradients(checkpoint.model)
    if arguments.fuse_mlp:
        fuse_mlp(checkpoint.model)
    if arguments.channels_last:
        _use_channels_last(checkpoint.model, training)
    if getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing:
        if not checkpoint.model.supports_gradient_checkpointing:
            raise ConfigError(f"activation checkpointing: {type(checkpoint.model).__name__} does not support it")
        if arguments.train != "all":
            checkpoint.model.enable_input_require_grads()
    chosen = _with_used_groups(recipe, checkpoint.model)
    options: dict[str, Any] = {"optimizer_arguments": chosen}
    weight, every = recipe.optimizer.domain_penalty, recipe.logging.log_activations
    if not any(isinstance(module, LearnableActivation) for module in checkpoint.model.modules()):
        for key, value in (("domain_penalty", weight), ("log_activations", every)):
            if value:
                raise ConfigError(
                    f"{key} {value}: {type(checkpoint.model).__name__} has no learnable activations; give --activation"
                )
    if weight:
        options["penalty"] = DomainPenalty(checkpoint.model, weight, recipe.optimizer.domain_penalty_interval)
    if every is not None:
        options["callbacks"] = [ActivationLogger(every)]
    check_augmentation(recipe.augmentation, training, checkpoint, train)
    try:
        check_optimizer(training, checkpoint.model, chosen)
        trainer = make_trainer(checkpoint, training, train, held_back, **options)
    except HfOrthoError:
        raise
    except Exception as error:  # a missing logger, an unreachable Hub, invalid values
        raise ConfigError(f"training arguments: {explain(error)}") from error
    trainer.channels_last = arguments.channels_last
    varied = of(checkpoint.model).varied(train, training.seed) if isinstance(train, Dataset) else None
    if varied is not None:
        trainer.train_dataset = varied
        trainer.add_callback(Epochs(varied))
    augment(trainer, checkpoint, recipe.augmentation, recipe.data.dataset or "dataset")
    return trainer, trainable


def _with_used_groups(recipe: Recipe, model: PreTrainedModel) -> OptimizerArguments:
    """The settings of the optimizer, without groups that only other activations of a comparison have."""
    chosen = recipe.optimizer_arguments()
    entries: Any = chosen.param_groups
    if not entries:
        return chosen
    trains_activations = recipe.model.train == "all" or recipe.model.train in LEARNABLE
    _, used = assign(model, entries, set(absent_names(model, recipe.others if trains_activations else ())))
    for entry in (entry for i, entry in enumerate(entries) if i not in used):
        logger.info(f"param_groups: pattern {entry['pattern']!r} matches no parameter here, only of other activations")
    return dataclasses.replace(chosen, param_groups=[entries[i] for i in used])


def _use_channels_last(model: Any, training: TrainingArguments) -> None:
    if model.main_input_name != "pixel_values":
        raise ConfigError(f"channels_last: needs a model of images, which {type(model).__name__} is not")
    if fsdp_version(training) is not None or training.deepspeed_plugin is not None:
        raise ConfigError(
            "channels_last: not supported by FSDP2 and DeepSpeed; set it to false, or use one process or multi_gpu"
        )
    model.to(memory_format=torch.channels_last)


def _wrap(checkpoint: Checkpoint, recipe: Recipe, train: Dataset | Stream, resume: str | None) -> PeftModel:
    arguments, seed = recipe.model, recipe.training.seed
    if arguments.adapter:
        if arguments.train in FITTED:
            samples = arguments.calibration_samples
            calibrated = f", calibrated on {samples} samples" if samples else ""
            logger.info(f"Adding an adapter of {arguments.activation}{calibrated}")
        batches = _calibration(checkpoint, arguments, train)
        return add_adapter(checkpoint, arguments, recipe.lora, seed, batches, resume)
    return add_lora(checkpoint.model, recipe.lora, seed, arguments.train, modules_to_save=list(checkpoint.new_modules))


def _calibration(checkpoint: Checkpoint, arguments: ModelArguments, train: Dataset | Stream) -> list[dict] | None:
    """The first training samples, one per batch."""
    if not arguments.calibration_samples:
        return None
    return batches(train, arguments.calibration_samples, collate=of(checkpoint.model).collator(checkpoint))
