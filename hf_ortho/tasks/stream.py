"""Corpora that are read while training, in a shuffled order that the seed fixes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, islice

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from transformers import TrainingArguments

from ..errors import ConfigError, DataError
from . import data
from .arguments import DataArguments
from .packing import DOCUMENTS, Packer
from .shards import why_unreadable

Samples = Callable[[Iterable[dict]], Iterator[dict]]


class Stream(torch.utils.data.IterableDataset):
    """Samples made on the fly from the rows of a dataset, pass after pass without end.

    Each pass takes the shards in a new order and the rows from a shuffle buffer, both by the seed and the number of the
    pass. With several dataloader workers each reads its own shards, so the order depends on their number too.

    Without end, because Trainer takes a stream for a single epoch and finds its place in it again by the number of
    batches since the start.

    Args:
        rows: what is read.
        samples: makes samples of rows; may keep what is left of some rows for the next sample.
        name: of the dataset, for messages.
        seed: of the order.
        buffer_size: rows from which the next one is drawn.
        mixing: samples from which the next one is drawn: those of one row follow each other otherwise.
        features: of the samples, where they name classes.
    """

    def __init__(
        self,
        rows: IterableDataset,
        samples: Samples,
        name: str,
        seed: int,
        buffer_size: int,
        features: Features | None = None,
        mixing: int = 1,
    ) -> None:
        self.rows, self.samples, self.name = rows, samples, name
        self.seed, self.buffer_size, self.features, self.mixing = seed, buffer_size, features, mixing

    def __iter__(self) -> Iterator[dict]:
        return mixed(self.samples(self._shuffled()), self.mixing, np.random.default_rng(self.seed))

    def _shuffled(self) -> Iterator[dict]:
        for number in count():
            # Not set_epoch, whose value is shared by all workers, while they may be in different passes.
            order = np.random.default_rng([self.seed, number])
            # One shard at a time: several are read by threads, for whose end datasets waits 5 s.
            rows = self.rows.shuffle(generator=order, buffer_size=self.buffer_size, max_buffer_input_shards=1)
            row = None
            for row in read(rows, self.name):
                yield row
            if row is None:  # this worker has no shard
                return

    def head(self, number: int) -> list[dict]:
        """The first samples of the dataset in its own order, at most ``number`` of them."""
        return list(islice(self.samples(read(self.rows, self.name)), number))


def mixed(samples: Iterable[dict], size: int, order: np.random.Generator) -> Iterator[dict]:
    """Each sample once, drawn from a buffer of ``size`` of them, which is filled first."""
    buffer: list[dict] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        place = int(order.integers(size))
        yield buffer[place]
        buffer[place] = sample
    yield from (buffer[i] for i in order.permutation(len(buffer)))


def check_stream(arguments: DataArguments, training: TrainingArguments) -> None:
    """Raise ``ConfigError`` for arguments that do not fit a stream."""
    if training.max_steps < 1 and arguments.max_train_samples is None:
        raise ConfigError("streaming: a stream has no end, so max_steps says when the training ends: give --max_steps")
    for key in ("shuffle_buffer", "shuffle_blocks"):
        if (value := getattr(arguments, key)) < 1:
            raise ConfigError(f"{key} {value}: must be at least 1")


def read(rows: Iterable[dict], name: str) -> Iterator[dict]:
    """The rows; what goes wrong when they are read becomes a ``DataError``."""
    try:
        yield from rows
    except Exception as error:  # datasets raises many kinds, from pyarrow's to huggingface_hub's
        raise DataError(f"dataset {name!r} cannot be read: {why_unreadable(name, error)}") from error


def without_rows(rows: IterableDataset, name: str) -> Dataset:
    """An empty dataset with the columns and types of a stream; the first row tells them if the stream does not."""
    features = rows.features or Dataset.from_list(list(read(rows.take(1), name))).features
    return Dataset.from_dict({column: [] for column in features}, features)


def packed(
    rows: Iterable[dict], tokenizer, block_size: int, column: str, held_back: frozenset[str] = frozenset()
) -> Iterator[dict]:
    """Blocks of tokens (see ``Packer``) as ``input_ids`` and ``labels``, without the documents that are held back."""
    pack, rows = Packer(tokenizer, block_size), iter(rows)
    while texts := [row[column] for row in islice(rows, DOCUMENTS)]:
        for block in torch.from_numpy(pack(text for text in texts if text not in held_back)):
            block = block.clone()  # a view would keep all blocks of these documents in memory
            yield {"input_ids": block, "labels": block}


def prepared(rows: Iterable[dict], features: Features, prepare: Callable[[Dataset], Dataset]) -> Iterator[dict]:
    """Samples of rows, 32 rows at a time; ``prepare`` is what a whole dataset goes through."""
    rows = iter(rows)
    while batch := list(islice(rows, 32)):
        yield from prepare(Dataset.from_list(batch, features=features))


def stream_text(
    rows: IterableDataset,
    held_back_rows: IterableDataset | None,
    tokenizer,
    block_size: int,
    arguments: DataArguments,
    seed: int,
) -> tuple[Stream | Dataset, Dataset]:
    """A stream of blocks for the training, and a whole dataset of blocks for the evaluation.

    Without rows for the evaluation its ``max_eval_samples`` blocks are the first ones, and the documents that they are
    made of never train, wherever they occur. ``max_train_samples`` gives a whole dataset of the first blocks.

    Raises:
        ConfigError: there is nothing to evaluate on, and no ``max_eval_samples``.
        DataError: there is no column of text, or a part has less than one block.
    """
    name, held_back_name = str(arguments.dataset), str(arguments.eval_dataset or arguments.dataset)
    blocks = partial(packed, tokenizer=tokenizer, block_size=block_size)
    column = data.text_column(without_rows(rows, name), arguments.text_column, name)
    documents: list[str] = []
    if held_back_rows is None:
        if arguments.max_eval_samples is None:
            raise ConfigError(
                f"streaming: {name} has no other split to evaluate on: give --eval_dataset, or --max_eval_samples N to "
                "hold back the documents of the first N blocks"
            )
        documents = _documents_of(read(rows, name), Packer(tokenizer, block_size), column, arguments.max_eval_samples)
        evaluation = blocks([{column: text} for text in documents], column=column)
    else:
        empty = without_rows(held_back_rows, held_back_name)
        other_column = data.text_column(empty, arguments.text_column, held_back_name)
        evaluation = blocks(read(held_back_rows, held_back_name), column=other_column)
    train_blocks = partial(blocks, column=column, held_back=frozenset(documents))
    documents_only = rows.select_columns([column])
    stream = Stream(documents_only, train_blocks, name, seed, arguments.shuffle_buffer, mixing=arguments.shuffle_blocks)
    train = stream.head(arguments.max_train_samples or 1)
    if not train:
        but = f" but for the {len(documents)} documents held back: give --eval_dataset" if documents else ""
        raise DataError(f"{name} has less than one block of {block_size} tokens{but}")
    held_back = _whole(islice(evaluation, arguments.max_eval_samples))
    if not len(held_back):
        raise DataError(f"{held_back_name} has less than one block of {block_size} tokens to evaluate on")
    return stream if arguments.max_train_samples is None else _whole(train), held_back


def _documents_of(rows: Iterable[dict], pack: Packer, column: str, number: int) -> list[str]:
    """The documents of the first ``number`` blocks."""
    documents, blocks = [], 0
    for row in rows:
        documents.append(row[column])
        blocks += len(pack([row[column]]))
        if blocks >= number:
            break
    return documents


def _whole(blocks: Iterable[dict]) -> Dataset:
    columns = {"input_ids": [np.asarray(block["input_ids"]) for block in blocks]}
    return Dataset.from_dict(columns | {"labels": columns["input_ids"]}, data.BLOCK_FEATURES).with_format("torch")


def stream_classified(
    rows: IterableDataset, prepare: Callable[[Dataset], Dataset], arguments: DataArguments, seed: int
) -> Stream | Dataset:
    """A stream of samples with a class; a whole dataset of the first ``max_train_samples`` of them if that is given.

    Args:
        prepare: makes samples of a whole dataset, see ``Task.prepare``.

    Raises:
        DataError: the labels are not a ``ClassLabel``, so that the classes are not known before all rows are read.
    """
    name, rows = str(arguments.dataset), undecoded(rows)
    empty = without_rows(rows, name)
    column = data.class_column(empty, arguments.label_column, name)
    if not isinstance(empty.features[column], ClassLabel):
        raise DataError(
            f"streaming: column {column!r} of {name} is not a ClassLabel, so its classes are not known before it is "
            "read whole: leave out streaming"
        )
    if arguments.max_train_samples is not None:
        return prepare(first_rows(rows, arguments.max_train_samples, name))
    samples = partial(prepared, features=empty.features, prepare=prepare)
    return Stream(rows, samples, name, seed, arguments.shuffle_buffer, prepare(empty).features)


def undecoded(rows: IterableDataset) -> IterableDataset:
    """Rows whose images are decoded when they are processed, not in the shuffle buffer."""
    for column in [column for column, feature in (rows.features or {}).items() if isinstance(feature, Image)]:
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def first_rows(rows: IterableDataset, number: int | None, name: str) -> Dataset:
    """The first ``number`` rows of a stream (None: all) as a whole dataset."""
    rows = undecoded(rows)
    return Dataset.from_list(list(islice(read(rows, name), number)), features=without_rows(rows, name).features)
