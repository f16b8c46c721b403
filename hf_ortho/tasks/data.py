"""Text and images from local files, the Hub or the built-in datasets, prepared as samples."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import torch
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.load import Checkpoint
from ..checkpoints.revision import is_commit
from ..errors import ConfigError, DataError
from ..files import explain, logger
from .arguments import DataArguments
from .built_in import BUILT_IN
from .columns import text_column
from .local import load_local
from .packing import DOCUMENTS, Packer
from .shards import is_local

TRAIN, HELD_BACK = ("train",), ("validation", "valid", "dev", "test")
CHARACTERS = 64  # more than a token takes in any text but long runs of spaces
BLOCK_FEATURES = Features({key: List(Value("int64")) for key in ("input_ids", "labels")})
NO_TOKENIZER = (
    "{} has no tokenizer, so text cannot be read for it; give one with --tokenizer (a folder, a Hub model, or bytes)"
)


def load(
    name: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    check: bool = True,
) -> DatasetDict | IterableDatasetDict:
    """Load all splits of a dataset.

    Args:
        name: a data file (see ``shards.BUILDERS``) or image, a folder or glob pattern of such files of one type (of
            images: one subfolder per class), a folder written by ``save_to_disk``, the name of a dataset on the Hub, or
            ``pydoc_topics`` / ``digits``.
        config_name, revision: configuration and revision of a Hub dataset.
        streaming: read rows during iteration instead of all at once.
        check: read a local dataset once to check that all strings are UTF-8, unless it is streamed.

    Raises:
        DataError: the dataset does not exist or cannot be read.
    """
    if name in BUILT_IN:
        splits = BUILT_IN[name]()
        return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}) if streaming else splits
    if is_local(name):
        return load_local(name, streaming, check)
    try:
        return datasets.load_dataset(name, config_name, revision=revision, streaming=streaming)
    except Exception as error:  # datasets raises many types, from pyarrow's to huggingface_hub's
        raise DataError(
            f"dataset {name!r} cannot be read as a file, a folder or a Hub dataset (built in: {', '.join(BUILT_IN)}): "
            f"{explain(error)}"
        ) from error


def commit_of(name: str, *, config_name: str | None = None, revision: str | None = None) -> str | None:
    """The full commit hash of a Hub dataset; None if the dataset is local or unreadable."""
    if name in BUILT_IN or is_local(name):
        return None
    try:
        commit = datasets.load_dataset_builder(name, config_name, revision=revision).hash or ""
    except Exception:  # ``load`` reports the reason
        return None
    return resolved(commit)


def resolved(revision: str | None) -> str | None:
    """The revision if it is a full commit hash, else None."""
    return revision if is_commit(revision) else None


def pick(splits: DatasetDict, requested: str | None, usual: tuple[str, ...], name: str) -> str:
    """The name of the requested split, else of the first of ``usual`` that exists, else of the first split."""
    if requested and requested not in splits:
        raise DataError(f"dataset {name!r} has no split {requested!r}; it has: {', '.join(splits)}")
    return requested or next((s for s in usual if s in splits), next(iter(splits)))


def split(splits: DatasetDict, train: str | None, held_back: str | None, name: str) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation sets: the named splits, else train and validation or test; None if there is only one."""
    first = pick(splits, train, TRAIN, name)
    usual = tuple(s for s in HELD_BACK if s in splits and s != first)
    if not held_back and not usual:
        return splits[first], None
    return splits[first], splits[pick(splits, held_back, usual, name)]


def tokens_per_sample(checkpoint: Checkpoint, arguments: DataArguments) -> int:
    """``block_size``; default: the context length of the model, at most 1024.

    Raises:
        DataError: the checkpoint has no tokenizer.
        ConfigError: ``block_size`` exceeds the context length.
    """
    if checkpoint.tokenizer is None:
        raise DataError(NO_TOKENIZER.format(checkpoint.model.name_or_path))
    context = context_length(checkpoint.model) or 1024
    size = min(context, 1024) if arguments.block_size is None else arguments.block_size
    check_block_size(size, context)
    return size


def context_length(model: PreTrainedModel) -> int | None:
    """The context length of a model of text, None if it has none."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length - first_position(model) if length is not None and length > 0 else None  # XLNet has -1


def first_position(model: PreTrainedModel) -> int:
    """The first position of a text: 0, or after the id of the pad token in models derived from RoBERTa."""
    embeddings = (m for path, m in model.named_modules() if path.endswith("position_embeddings"))
    padding = (m.padding_idx for m in embeddings if isinstance(m, nn.Embedding))
    return next((index + 1 for index in padding if index is not None), 0)


def check_block_size(size: int, context: int) -> None:
    if not 2 <= size <= context:
        raise ConfigError(f"block_size {size}: must be between 2 and the model's context length of {context}")


def text_blocks(
    dataset: Dataset, tokenizer, block_size: int, column: str | None = None, name: str = "dataset"
) -> Dataset:
    """Tokenize documents, separated by the EOS token, and pack them into blocks of exactly ``block_size`` tokens.

    The columns ``input_ids`` and ``labels`` are equal: a causal LM shifts the labels itself. The last partial block is
    dropped. Empty documents and None are skipped.

    Raises:
        DataError: there is no text column, or less than one block.
    """
    column = text_column(dataset, column, name)
    pack = Packer(tokenizer, block_size)

    def blocks(batch):
        packed = pack(batch[column])
        return {"input_ids": packed, "labels": packed}

    packed = dataset.map(
        blocks, batched=True, batch_size=DOCUMENTS, remove_columns=dataset.column_names, features=BLOCK_FEATURES
    )
    if not len(packed):
        rest = Packer(tokenizer, block_size)  # the first one is not called if the result was cached
        for documents in dataset.iter(DOCUMENTS):
            rest(documents[column])
        raise DataError(too_short(name, len(rest.left), block_size))
    return packed.with_format("torch")


def first_blocks(
    dataset: Dataset, tokenizer, block_size: int, count: int, column: str | None = None, name: str = "dataset"
) -> list[Tensor]:
    """The first ``count`` blocks of ``text_blocks``, each (1, ``block_size``) int64.

    If the whole dataset is shorter than a block, this is one shorter block, with a note in the log.

    Raises:
        DataError: there is no text column, or less than 2 tokens.
    """
    pack, blocks = Packer(tokenizer, block_size), []
    for documents in documents_of(dataset, column, name, count * block_size):
        blocks += [block[None] for block in torch.from_numpy(pack(documents))]
        if len(blocks) >= count:
            return blocks[:count]
    if not blocks and len(pack.left) >= 2:
        logger.warning(f"note: {name} has {len(pack.left)} tokens, which are one block shorter than {block_size}")
        blocks = [torch.from_numpy(pack.left)[None]]
    if not blocks:
        raise DataError(too_short(name, len(pack.left), 2))
    return blocks


def first_chunks(
    dataset: Dataset, tokenizer, size: int, count: int, column: str | None = None, name: str = "dataset"
) -> list[Tensor]:
    """Each document as chunks of at most ``size`` tokens, with the special tokens of the model: the first ``count``,
    each (1, length) int64. Empty documents and None are skipped.

    Raises:
        DataError: there is no text column, or no text.
    """
    options = {"truncation": True, "max_length": size, "return_overflowing_tokens": True}
    chunks: list[Tensor] = []
    for documents in documents_of(dataset, column, name, count * size):
        texts = [text for text in documents if text]
        chunks += [torch.tensor([ids]) for ids in tokenizer(texts, **options)["input_ids"]] if texts else []
        if len(chunks) >= count:
            return chunks[:count]
    if not chunks:
        raise DataError(f"{name} has no text")
    return chunks


def documents_of(dataset: Dataset, column: str | None, name: str, tokens: int | None = None) -> Iterator[list[str]]:
    """The documents, a few at a time, each cut to the characters that ``tokens`` tokens can take, if given."""
    column = text_column(dataset, column, name)
    characters = None if tokens is None else CHARACTERS * tokens
    for batch in dataset.select_columns([column]).iter(DOCUMENTS):
        yield [(text or "")[:characters] for text in batch[column]]


def too_short(name: str, tokens: int, block_size: int) -> str:
    hint = f"; give a --block-size of at most {tokens}" if tokens >= 2 else ""
    return f"{name} has less than one block of {block_size} tokens: it has {tokens}{hint}"
