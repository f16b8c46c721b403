"""Fine-tune or evaluate a checkpoint on a dataset; the commands and the demo are thin layers over this."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from ..activations import parse
from ..conversion import ConversionReport, convert
from ..conversion.checkpoint import Checkpoint, load_checkpoint, replacing, save_checkpoint
from ..errors import ConfigError, DataError
from ..recompute import fuse_mlp
from . import data
from .arguments import DataArguments, ModelArguments
from .metrics import EVALUATORS
from .trainer import POLICIES, ActivationTrainer, set_trainable


@dataclasses.dataclass
class Result:
    """What a fine-tuning gave: the checkpoint in memory, metrics before and after, the conversion if there was one."""

    checkpoint: Checkpoint
    before: dict[str, float] | None
    after: dict[str, float] | None
    conversion: ConversionReport | None
    trainable: int


def prepare(checkpoint: Checkpoint, splits, arguments: DataArguments, name: str) -> Dataset:
    """One split as samples for the checkpoint's task."""
    if checkpoint.task == "causal-lm":
        if checkpoint.tokenizer is None:
            raise DataError(f"{checkpoint.model.name_or_path} has no tokenizer, so text cannot be read for it")
        context = getattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", None) or 1024
        block = arguments.block_size or min(context, 1024)
        if not 2 <= block <= context:
            raise ConfigError(f"block_size {block}: must be from 2 to the model's context of {context}")
        return data.text_blocks(splits, checkpoint.tokenizer, block, arguments.text_column, name)
    if checkpoint.task == "image-classification":
        if checkpoint.image_processor is None:
            raise DataError(f"{checkpoint.model.name_or_path} has no image processor, so images cannot be read for it")
        columns = (arguments.image_column, arguments.label_column)
        return data.images(splits, checkpoint.image_processor, *columns, name, class_names(checkpoint.model))
    raise ConfigError(
        f"{type(checkpoint.model).__name__}: the tasks are causal language modelling and image classification"
    )


def class_names(model: PreTrainedModel) -> list[str]:
    """The classes of an image classifier, in the order of its logits."""
    return [name for _, name in sorted((model.config.id2label or {}).items())]


def batches(dataset: Dataset, count: int, size: int = 1) -> list[dict]:
    """The first ``count`` samples as model inputs, labels included, ``size`` at a time."""
    rows = [dataset[i] for i in range(min(count, len(dataset)))]
    return [default_data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def make_trainer(checkpoint: Checkpoint, arguments: TrainingArguments, train=None, held_back=None) -> ActivationTrainer:
    """A Trainer with the task's metrics."""
    evaluator = EVALUATORS[checkpoint.task]
    # Images are processed on access, from columns that the model does not take.
    arguments.remove_unused_columns = False
    trainer = ActivationTrainer(
        model=checkpoint.model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_back,
        data_collator=default_data_collator,
        processing_class=checkpoint.processor,
        compute_metrics=evaluator.compute_metrics,
        preprocess_logits_for_metrics=evaluator.preprocess_logits_for_metrics,
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    return trainer


def metrics_of(trainer: ActivationTrainer) -> dict[str, float]:
    """Evaluate, with the Trainer's prefix and its throughput figures left out."""
    # "loss" of our metrics is the mean over all tokens; the Trainer's own is a mean of batch means.
    found = trainer.evaluate()
    kept = ("loss", "perplexity", "top1", "top5")
    return {key: float(found[f"eval_{key}"]) for key in kept if f"eval_{key}" in found}


def evaluate_model(checkpoint: Checkpoint, dataset: Dataset, batch_size: int = 8) -> dict[str, float]:
    """Loss and perplexity, or loss, top-1 and top-5, of a checkpoint on prepared samples."""
    with tempfile.TemporaryDirectory(prefix="hf_ortho.") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        if checkpoint.task == "image-classification":
            names, classes = data.class_names(dataset), checkpoint.model.config.num_labels or 0
            if len(names) > classes:
                raise DataError(f"the dataset has {len(names)} classes, {checkpoint.model.name_or_path} has {classes}")
        return metrics_of(make_trainer(checkpoint, arguments, held_back=dataset))


def load_splits(checkpoint: Checkpoint, arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation samples as the arguments describe them."""
    if not arguments.dataset:
        raise ConfigError("dataset is missing: give --dataset, or dataset in the config")
    options = {"config_name": arguments.dataset_config, "revision": arguments.dataset_revision}
    splits = data.load(arguments.dataset, **options)
    held_back_name = arguments.eval_dataset or arguments.dataset
    if arguments.eval_dataset:
        other = data.load(held_back_name)
        raw = splits[data.pick(splits, arguments.train_split, data.TRAIN, arguments.dataset)]
        raw_held_back = other[data.pick(other, arguments.eval_split, data.HELD_BACK, held_back_name)]
    else:
        raw, raw_held_back = data.split(splits, arguments.train_split, arguments.eval_split, arguments.dataset)
    train = prepare(checkpoint, raw, arguments, arguments.dataset)
    _match_classes(checkpoint, train)
    if raw_held_back is not None:
        held_back = prepare(checkpoint, raw_held_back, arguments, held_back_name)
    elif len(train) > 1:
        train, held_back = _hold_back(train, checkpoint.task)
    else:
        held_back = None
    return _head_of(train, arguments.max_train_samples), _head_of(held_back, arguments.max_eval_samples)


def _hold_back(samples: Dataset, task: str) -> tuple[Dataset, Dataset]:
    """A tenth of the samples: the end of a text, whose neighbours overlap in content; random images."""
    count = max(1, len(samples) // 10)
    order = range(len(samples)) if task == "causal-lm" else np.random.default_rng(0).permutation(len(samples)).tolist()
    return samples.select(order[:-count]), samples.select(order[-count:])


def _head_of(dataset, count: int | None):
    return dataset if dataset is None or count is None else dataset.select(range(min(count, len(dataset))))


def finetune(model_arguments: ModelArguments, data_arguments: DataArguments, arguments: TrainingArguments) -> Result:
    """Load, convert if asked, train, evaluate, and save into ``arguments.output_dir``.

    Resumes where ``arguments.resume_from_checkpoint`` says so (``"true"`` for the latest in the output folder).

    Raises:
        HfOrthoError: an argument does not fit; nothing is written.
    """
    if not model_arguments.model:
        raise ConfigError("model is missing: give --model, or model in the config")
    if model_arguments.train not in POLICIES:
        raise ConfigError(f"train {model_arguments.train!r}: must be one of {', '.join(POLICIES)}")
    if model_arguments.activation:
        parse(model_arguments.activation)
    for key in ("max_train_samples", "max_eval_samples"):
        if (value := getattr(data_arguments, key)) is not None and value < 1:
            raise ConfigError(f"{key} {value}: must be at least 1")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, key) < 1:
            raise ConfigError(f"{key} {getattr(arguments, key)}: must be at least 1")
    resume = _resume_from(arguments)
    checkpoint = load_checkpoint(
        model_arguments.model, revision=model_arguments.model_revision, dtype=model_arguments.dtype
    )
    train, held_back = load_splits(checkpoint, data_arguments)
    report = _convert_first(checkpoint, model_arguments, train)
    trainable = set_trainable(checkpoint.model, model_arguments.train)
    if model_arguments.fuse_mlp:
        fuse_mlp(checkpoint.model)
    if getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing:
        if not checkpoint.model.supports_gradient_checkpointing:
            raise ConfigError(f"activation checkpointing: {type(checkpoint.model).__name__} does not support it")
        if model_arguments.train != "all":
            checkpoint.model.enable_input_require_grads()
    try:
        trainer = make_trainer(checkpoint, arguments, train, held_back)
    except ValueError as error:
        raise ConfigError(f"training arguments: {str(error).splitlines()[0]}") from error
    before = metrics_of(trainer) if held_back is not None else None
    trainer.train(resume_from_checkpoint=resume)
    after = metrics_of(trainer) if held_back is not None else None
    if trainer.is_world_process_zero():
        save_beside_checkpoints(checkpoint, Path(str(arguments.output_dir)))
    return Result(checkpoint, before, after, report, trainable)


def _resume_from(arguments: TrainingArguments) -> str | None:
    folder = Path(arguments.output_dir or "trainer_output")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; name a folder")
    asked = arguments.resume_from_checkpoint
    if asked and str(asked).lower() not in ("true", "false"):
        if not Path(asked).is_dir():
            raise ConfigError(f"resume_from_checkpoint {asked}: no such folder")
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ConfigError(
                f"resume_from_checkpoint {asked}: no checkpoint of a training, it has no trainer_state.json"
            )
        return str(asked)
    if asked and str(asked).lower() == "true":
        latest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if latest is None:
            raise ConfigError(f"resume_from_checkpoint true: {folder} holds no checkpoint-N folder")
        return latest
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"output_dir {folder} exists and is not empty; name another, or resume with --resume_from_checkpoint true"
        )
    return None


def _convert_first(checkpoint: Checkpoint, arguments: ModelArguments, train: Dataset) -> ConversionReport | None:
    if not arguments.activation:
        return None
    done = getattr(checkpoint.model.config, "hf_ortho", None)
    family, degree = parse(arguments.activation)
    if done and done.get("activation") == f"{family.family}_{degree}":
        return None
    samples = batches(train, arguments.calibration_samples) if arguments.calibration_samples else None
    return convert(checkpoint.model, arguments.activation, calibration=samples)


def _match_classes(checkpoint: Checkpoint, train: Dataset) -> None:
    """Give an image classifier a new head if the dataset has other classes than the checkpoint."""
    if checkpoint.task != "image-classification":
        return
    names = data.class_names(train)
    model = checkpoint.model
    model.config.id2label, old = dict(enumerate(names)), model.config.num_labels
    model.config.label2id = {name: i for i, name in enumerate(names)}
    if old == len(names):
        return
    head = next((m for m in (getattr(model, n, None) for n in ("classifier", "head", "fc")) if m is not None), None)
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(
            f"{model.name_or_path} has {old} classes, the dataset {len(names)}, and "
            f"{type(model).__name__} has no linear head to replace"
        )
    torch.manual_seed(0)
    new = torch.nn.Linear(head.in_features, len(names), dtype=head.weight.dtype, device=head.weight.device)
    torch.nn.init.normal_(new.weight, std=getattr(model.config, "initializer_range", 0.02))
    torch.nn.init.zeros_(new.bias)
    for name, module in model.named_children():
        if module is head:
            setattr(model, name, new)
    setattr(model, "num_labels", len(names))  # noqa: B010


def save_beside_checkpoints(checkpoint: Checkpoint, folder: Path) -> None:
    """Put the final model into a folder that may hold training checkpoints, each file complete or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "final.draft") as draft:
        save_checkpoint(checkpoint, draft)
    for file in sorted((folder / "final.draft").iterdir()):
        file.replace(folder / file.name)
    (folder / "final.draft").rmdir()


def change(before: float, after: float) -> str:
    """``after`` against ``before`` in per cent."""
    return f"{(after / before - 1):+.3%}" if before and math.isfinite(before) else "-"
