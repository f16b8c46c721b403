"""Streaming: datasets read during training, in a shuffled order determined by the seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import TrainingArguments

from ..errors import ConfigError, DataError
from . import columns, data
from .arguments import DataArguments
from .conversations import conversations
from .faults import why_unreadable
from .packing import DOCUMENTS, Packer
from .windows import text_windows

if TYPE_CHECKING:
    from .masking import MaskedBlocks

Samples = Callable[[Iterable[dict]], Iterator[dict]]


class Stream(torch.utils.data.IterableDataset):
    """An infinite stream of samples, made on the fly by repeated passes over the rows of a dataset.

    Each pass shuffles the shards, and the rows within a buffer, from the seed and the number of the pass. Each
    dataloader worker reads different shards, so the order also depends on the number of workers.

    The stream is infinite because Trainer treats it as a single epoch: on resume, Trainer skips the number of batches
    consumed since the start.

    Args:
        rows: the rows to read.
        samples: makes samples from rows. It may carry leftovers of some rows over to the next sample.
        name: name of the dataset, for messages.
        seed: seed of the order.
        buffer_size: shuffle-buffer size in rows.
        mixing: shuffle-buffer size in samples (samples of one row are otherwise adjacent).
        features: features of the samples if they contain class names.
        finish: makes the samples that the model takes from those of ``samples``, the seed and the number of the sample;
            without the last two for ``head``.
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
        finish: Callable[..., dict] | None = None,
    ) -> None:
        self.rows, self.samples, self.name, self.finish = rows, samples, name, finish
        self.seed, self.buffer_size, self.features, self.mixing = seed, buffer_size, features, mixing
        self.process, self.processes = 0, 1

    def part(self, process: int, processes: int) -> Stream:
        """The samples of one of several processes, which reads other rows than the rest in each pass.

        Each process has whole shards if their number is a multiple of ``processes``, else each ``processes``-th row.
        """
        part = copy.copy(self)
        part.rows = split_dataset_by_node(self.rows, process, processes)
        part.process, part.processes = process, processes
        return part

    def __iter__(self) -> Iterator[dict]:
        samples = mixed(self.samples(self._shuffled()), self.mixing, np.random.default_rng(self.seed))
        finish = self.finish
        return samples if finish is None else (finish(sample, self.seed, i) for i, sample in enumerate(samples))

    def _shuffled(self) -> Iterator[dict]:
        for number in count():
            # Not set_epoch: all workers share its value, but they may be in different passes.
            order = np.random.default_rng([self.seed, number])
            # One shard at a time: datasets reads several in threads and waits 5 s for them to end.
            rows = self.rows.shuffle(generator=order, buffer_size=self.buffer_size, max_buffer_input_shards=1)
            row = None
            for row in read(rows, self.name):
                yield row
            if row is None:  # this worker has no shard
                worker = torch.utils.data.get_worker_info()
                if self.processes > 1 and (worker is None or worker.id == 0):  # the other processes would wait for it
                    raise DataError(
                        f"{self.name} has no rows for process {self.process} of {self.processes}; use fewer processes "
                        "or dataloader workers, or set dispatch_batches to true in accelerator_config"
                    )
                return

    def head(self, number: int) -> list[dict]:
        """The first samples, at most ``number``, in the unshuffled order of the dataset."""
        samples = list(self.first(number))
        return samples if self.finish is None else list(map(self.finish, samples))

    def first(self, number: int) -> Iterator[dict]:
        """The samples of ``head`` before ``finish``."""
        return islice(self.samples(read(self.rows, self.name)), number)


def mixed(samples: Iterable[dict], size: int, order: np.random.Generator) -> Iterator[dict]:
    """Each sample once, drawn at random from a buffer of ``size`` samples, which is filled first."""
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
    """Raise ``ConfigError`` for arguments that are invalid for a stream."""
    if training.max_steps < 1 and arguments.max_train_samples is None:
        raise ConfigError("streaming: a stream is infinite, so training needs a number of steps; give --max_steps")


def read(rows: Iterable[dict], name: str) -> Iterator[dict]:
    """Yield the rows. Any error while reading becomes a ``DataError``."""
    try:
        yield from rows
    except Exception as error:  # datasets raises many types, from pyarrow's to huggingface_hub's
        raise DataError(f"dataset {name!r} cannot be read: {why_unreadable(name, error)}") from error


def without_rows(rows: IterableDataset, name: str) -> Dataset:
    """An empty dataset with the columns and types of a stream, inferred from the first row if necessary."""
    features = rows.features or Dataset.from_list(list(read(rows.take(1), name))).features
    return Dataset.from_dict({column: [] for column in features}, features)


def packed(
    rows: Iterable[dict], tokenizer, block_size: int, column: str, held_back: frozenset[str] = frozenset()
) -> Iterator[dict]:
    """Blocks of tokens (see ``Packer``) as ``input_ids`` and ``labels``, without the held-out documents."""
    pack = Packer(tokenizer, block_size)
    for texts in _texts(rows, column):
        for block in torch.from_numpy(pack(text for text in texts if text not in held_back)):
            block = block.clone()  # a view would keep all blocks of these documents in memory
            yield {"input_ids": block, "labels": block}


def _texts(rows: Iterable[dict], column: str) -> Iterator[list[str]]:
    """The documents, a few at a time."""
    rows = iter(rows)
    while texts := [row[column] for row in islice(rows, DOCUMENTS)]:
        yield texts


def prepared(rows: Iterable[dict], features: Features, prepare: Callable[[Dataset], Dataset]) -> Iterator[dict]:
    """Samples made from 32 rows at a time; ``prepare`` is the transform of a whole dataset."""
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
    masks: MaskedBlocks | None = None,
) -> tuple[Stream | Dataset, Dataset]:
    """A stream of blocks for training, and windows or conversations for evaluation; masked blocks with ``masks``.

    Without evaluation rows, the first ``max_eval_samples`` blocks are held out, and their documents are excluded from
    training wherever they occur. With ``max_train_samples``, the training set is a dataset of the first blocks.

    Raises:
        ConfigError: there is no evaluation data and no ``max_eval_samples``.
        DataError: there is no text column, or there is less than one block to train, or 2 tokens to evaluate on.
    """
    name, held_back_name = str(arguments.dataset), str(arguments.eval_dataset or arguments.dataset)
    blocks: Any = partial(packed, tokenizer=tokenizer, block_size=block_size) if masks is None else masks.packed
    whole = _whole if masks is None else masks.dataset
    column = columns.text_column(without_rows(rows, name), arguments.text_column, name)
    documents: list[str] = []
    evaluation: Iterable[list[str]] = []
    chats: Iterable[dict] | None = None
    if held_back_rows is None:
        if arguments.max_eval_samples is None:
            raise ConfigError(
                f"streaming: {name} has no evaluation split; give --eval_dataset, or --max_eval_samples N to hold out "
                "the documents of the first N blocks"
            )
        documents = _documents_of(read(rows, name), Packer(tokenizer, block_size), column, arguments.max_eval_samples)
        evaluation = [documents]
    else:
        empty = without_rows(held_back_rows, held_back_name)
        # Conversations have no column of text: without masks, they are evaluated a row at a time.
        if masks is None and columns.instruction_columns(empty, arguments.text_column):
            chats = read(held_back_rows, held_back_name)
        else:
            other_column = columns.text_column(empty, arguments.text_column, held_back_name)
            evaluation = _texts(read(held_back_rows, held_back_name), other_column)
    train_blocks = partial(blocks, column=column, held_back=frozenset(documents))
    options: dict[str, Any] = {"mixing": arguments.shuffle_blocks, "finish": None if masks is None else masks.sample}
    stream = Stream(rows.select_columns([column]), train_blocks, name, seed, arguments.shuffle_buffer, **options)
    train = list(stream.first(arguments.max_train_samples or 1))
    if not train:
        rest = f" after holding out {len(documents)} documents; give --eval_dataset" if documents else ""
        raise DataError(f"{name} has less than one block of {block_size} tokens{rest}")
    if masks is None:
        most = arguments.max_eval_samples
        if chats is None:
            held_back = text_windows(evaluation, tokenizer, block_size, most=most, name=held_back_name)
        else:
            held_back = conversations(chats, tokenizer, block_size, held_back_name, most)
    else:
        bodies = masks.packed(({column: text} for texts in evaluation for text in texts), column)
        held_back = masks.dataset(islice(bodies, arguments.max_eval_samples))
        if not len(held_back):
            raise DataError(f"{held_back_name} has no text to evaluate on")
    return stream if arguments.max_train_samples is None else whole(train), held_back


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
    ids = [np.asarray(block["input_ids"]) for block in blocks]
    return Dataset.from_dict({"input_ids": ids, "labels": ids}, data.BLOCK_FEATURES).with_format("torch")


def stream_classified(
    rows: IterableDataset, prepare: Callable[[Dataset], Dataset], arguments: DataArguments, seed: int
) -> Stream | Dataset:
    """A stream of labeled samples, or a dataset of the first ``max_train_samples`` samples if that is given.

    Args:
        prepare: makes samples from a dataset; see ``Task.prepare``.

    Raises:
        DataError: the labels are not a ``ClassLabel``, so the classes are unknown until all rows are read.
    """
    name, rows = str(arguments.dataset), undecoded(rows)
    empty = without_rows(rows, name)
    column = columns.class_column(empty, arguments.label_column, name)
    features = prepare(empty).features
    if not isinstance(empty.features[column], ClassLabel) and any(isinstance(f, ClassLabel) for f in features.values()):
        raise DataError(
            f"streaming: column {column!r} of {name} is not a ClassLabel, so its classes are unknown until all rows "
            "are read; set streaming: false"
        )
    if arguments.max_train_samples is not None:
        return prepare(first_rows(rows, arguments.max_train_samples, name))
    samples = partial(prepared, features=empty.features, prepare=prepare)
    return Stream(rows, samples, name, seed, arguments.shuffle_buffer, features)


def undecoded(rows: IterableDataset) -> IterableDataset:
    """The rows with undecoded images: they are decoded on processing, not in the shuffle buffer."""
    for column in [column for column, feature in (rows.features or {}).items() if isinstance(feature, Image)]:
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def first_rows(rows: IterableDataset, number: int | None, name: str) -> Dataset:
    """The first ``number`` rows of a stream (all if None) as a dataset."""
    rows = undecoded(rows)
    return Dataset.from_list(list(islice(read(rows, name), number)), features=without_rows(rows, name).features)
