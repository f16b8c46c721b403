"""Training and evaluation samples from the data of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from datasets import Dataset
from transformers import default_data_collator

from ..checkpoints.load import Checkpoint
from ..errors import ConfigError
from . import data, of
from .arguments import DataArguments
from .stream import Stream


def batches(
    dataset: Dataset | Stream,
    count: int,
    size: int = 1,
    collate: Callable[[list[dict]], dict] = default_data_collator,
) -> list[dict]:
    """The first ``count`` samples as model inputs, labels included, ``size`` at a time."""
    rows = dataset.head(count) if isinstance(dataset, Stream) else list(head(dataset, count))
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def head(dataset: Dataset, count: int | None) -> Dataset:
    """The first ``count`` samples; None for all."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def load_splits(
    checkpoint: Checkpoint, arguments: DataArguments, seed: int = 0
) -> tuple[Dataset | Stream, Dataset | None]:
    """Load and prepare the training and evaluation samples. ``seed`` determines the order of a stream."""
    task, name = of(checkpoint.model), arguments.needed_dataset()
    if arguments.tokenize and checkpoint.tokenizer is None:
        raise ConfigError(f"tokenize {arguments.tokenize}: {type(checkpoint.model).__name__} has no tokenizer")
    # Tokenizing checks the text by itself, and a token cache is to be reused without reading the text again.
    load = partial(data.load, streaming=arguments.streaming, check=arguments.tokenize is None)
    config, revision = arguments.dataset_config, arguments.dataset_revision
    revision = data.commit_of(name, config_name=config, revision=revision) or revision
    arguments.dataset_revision = revision  # pin the commit: a branch may move
    splits = load(name, config_name=config, revision=revision)
    held_back_name = arguments.eval_dataset or name
    if arguments.eval_dataset:
        other = load(held_back_name, revision=data.commit_of(held_back_name))
        raw = splits[data.pick(splits, arguments.train_split, data.TRAIN, name)]
        raw_held_back = other[data.pick(other, arguments.eval_split, data.HELD_BACK, held_back_name)]
    else:
        raw, raw_held_back = data.split(splits, arguments.train_split, arguments.eval_split, name)
    if arguments.streaming:
        return task.stream(checkpoint, raw, raw_held_back, arguments, seed)
    train, held_back = task.prepare(checkpoint, raw, arguments, name), None
    task.adapt_head(checkpoint, train, seed)
    if raw_held_back is not None:
        held_back = task.prepare_evaluation(checkpoint, raw_held_back, arguments, held_back_name)
        task.check_classes(train, held_back, held_back_name)
    elif len(train) > 1:
        most = arguments.max_eval_samples if arguments.tokenize else None
        train, held_back = _hold_back(train, most, task.random_split)
    if held_back is not None:
        held_back = head(held_back, arguments.max_eval_samples)
    return head(train, arguments.max_train_samples), held_back


def _hold_back(samples: Dataset, most: int | None, at_random: bool) -> tuple[Dataset, Dataset]:
    """Split off a tenth of the samples, at most ``most`` if it is given."""
    count = max(1, min(len(samples) // 10, most or len(samples)))
    order = range(len(samples))
    if at_random:
        order = np.random.default_rng(0).permutation(len(samples)).tolist()
    return samples.select(order[:-count]), samples.select(order[-count:])
