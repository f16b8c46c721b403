"""Samples for the task of a checkpoint: blocks of tokens, or processed images, from the data a recipe names."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, default_data_collator
from transformers.utils import logging

from ..checkpoints.load import Checkpoint
from ..errors import ConfigError, DataError
from ..training.arguments import DataArguments
from . import data
from .stream import Stream, first_rows, stream_images, stream_text

logger = logging.get_logger("hf_ortho")


def prepare(checkpoint: Checkpoint, splits, arguments: DataArguments, name: str) -> Dataset:
    """One split as samples for the checkpoint's task."""
    if checkpoint.task == "causal-lm":
        block = _block_size(checkpoint, arguments)
        return data.text_blocks(splits, checkpoint.tokenizer, block, arguments.text_column, name)
    if checkpoint.task == "image-classification":
        if checkpoint.image_processor is None:
            raise DataError(f"{checkpoint.model.name_or_path} has no image processor, so images cannot be read for it")
        columns = (arguments.image_column, arguments.label_column)
        return data.images(splits, checkpoint.image_processor, *columns, name, class_names(checkpoint.model))
    raise ConfigError(
        f"{type(checkpoint.model).__name__}: the tasks are causal language modelling and image classification"
    )


def _block_size(checkpoint: Checkpoint, arguments: DataArguments) -> int:
    if checkpoint.tokenizer is None:
        raise DataError(f"{checkpoint.model.name_or_path} has no tokenizer, so text cannot be read for it")
    context = getattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", None) or 1024
    block = arguments.block_size or min(context, 1024)
    if not 2 <= block <= context:
        raise ConfigError(f"block_size {block}: must be from 2 to the model's context of {context}")
    return block


def class_names(model: PreTrainedModel) -> list[str]:
    """The classes of an image classifier, in the order of its logits."""
    return [name for _, name in sorted((model.config.id2label or {}).items())]


def batches(dataset: Dataset | Stream, count: int, size: int = 1) -> list[dict]:
    """The first ``count`` samples as model inputs, labels included, ``size`` at a time."""
    rows = dataset.head(count) if isinstance(dataset, Stream) else list(_head_of(dataset, count))
    return [default_data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def load_splits(
    checkpoint: Checkpoint, arguments: DataArguments, seed: int = 0
) -> tuple[Dataset | Stream, Dataset | None]:
    """Training and evaluation samples as the arguments describe them; ``seed`` orders a stream."""
    if not arguments.dataset:
        raise ConfigError("dataset is missing: give --dataset, or dataset in the config")
    load = partial(data.load, streaming=arguments.streaming)
    config, revision = arguments.dataset_config, arguments.dataset_revision
    revision = data.commit_of(arguments.dataset, config_name=config, revision=revision) or revision
    arguments.dataset_revision = revision  # a branch may move
    splits = load(arguments.dataset, config_name=config, revision=revision)
    held_back_name = arguments.eval_dataset or arguments.dataset
    if arguments.eval_dataset:
        other = load(held_back_name, revision=data.commit_of(held_back_name))
        raw = splits[data.pick(splits, arguments.train_split, data.TRAIN, arguments.dataset)]
        raw_held_back = other[data.pick(other, arguments.eval_split, data.HELD_BACK, held_back_name)]
    else:
        raw, raw_held_back = data.split(splits, arguments.train_split, arguments.eval_split, arguments.dataset)
    if arguments.streaming:
        return _streamed(checkpoint, raw, raw_held_back, arguments, seed)
    train = prepare(checkpoint, raw, arguments, arguments.dataset)
    _match_classes(checkpoint, train, seed)
    if raw_held_back is not None:
        held_back = prepare(checkpoint, raw_held_back, arguments, held_back_name)
    elif len(train) > 1:
        train, held_back = _hold_back(train, checkpoint.task)
    else:
        held_back = None
    return _head_of(train, arguments.max_train_samples), _head_of(held_back, arguments.max_eval_samples)


def _streamed(checkpoint: Checkpoint, rows, held_back_rows, arguments: DataArguments, seed: int):
    if checkpoint.task == "causal-lm":
        block = _block_size(checkpoint, arguments)
        return stream_text(rows, held_back_rows, checkpoint.tokenizer, block, arguments, seed)
    name = str(arguments.dataset)
    if held_back_rows is None:
        raise ConfigError(f"streaming: {name} has no other split to evaluate on: give --eval_dataset")
    make = partial(prepare, checkpoint, arguments=arguments)
    train = stream_images(rows, partial(make, name=name), arguments, seed)
    _match_classes(checkpoint, train, seed)
    held_back_name = arguments.eval_dataset or name
    return train, make(first_rows(held_back_rows, arguments.max_eval_samples, held_back_name), name=held_back_name)


def _hold_back(samples: Dataset, task: str) -> tuple[Dataset, Dataset]:
    """A tenth of the samples: the end of a text, whose neighbours overlap in content; random images."""
    count = max(1, len(samples) // 10)
    order = range(len(samples)) if task == "causal-lm" else np.random.default_rng(0).permutation(len(samples)).tolist()
    return samples.select(order[:-count]), samples.select(order[-count:])


def _head_of(dataset, count: int | None):
    return dataset if dataset is None or count is None else dataset.select(range(min(count, len(dataset))))


def _match_classes(checkpoint: Checkpoint, train: Dataset, seed: int) -> None:
    """Give an image classifier a new head if the dataset has other classes than the checkpoint."""
    if checkpoint.task != "image-classification":
        return
    names, model = data.class_names(train), checkpoint.model
    known, old = class_names(model), model.config.num_labels
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(known))
    if known == names or (unnamed and old == len(names)):
        return
    head = next((m for m in (getattr(model, n, None) for n in ("classifier", "head", "fc")) if m is not None), None)
    if not isinstance(head, torch.nn.Linear):
        if old == len(names):
            return
        raise ConfigError(
            f"{model.name_or_path} has {old} classes, the dataset {len(names)}, and "
            f"{type(model).__name__} has no linear head to replace"
        )
    if old == len(names):
        logger.warning(
            f"note: the classes of {model.name_or_path} ({', '.join(known[:2])} ...) are not those of the dataset "
            f"({', '.join(names[:2])} ...): its head is made anew"
        )
    torch.manual_seed(seed)
    new = torch.nn.Linear(head.in_features, len(names), dtype=head.weight.dtype, device=head.weight.device)
    torch.nn.init.normal_(new.weight, std=getattr(model.config, "initializer_range", 0.02))
    torch.nn.init.zeros_(new.bias)
    for name, module in model.named_children():
        if module is head:
            setattr(model, name, new)
            checkpoint.new_head = name
    setattr(model, "num_labels", len(names))  # noqa: B010
