"""Text and images from local files, the Hub or the built-in datasets, prepared as samples."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDatasetDict, List, Value

from ..checkpoints.load import Checkpoint
from ..checkpoints.revision import is_commit
from ..errors import ConfigError, DataError
from .arguments import DataArguments
from .built_in import BUILT_IN
from .packing import DOCUMENTS, Packer
from .shards import BUILDERS, files_of, load_files, why_unreadable

TRAIN, HELD_BACK = ("train",), ("validation", "valid", "dev", "test")
BLOCK_FEATURES = Features({key: List(Value("int64")) for key in ("input_ids", "labels")})
NO_TOKENIZER = (
    "{} has no tokenizer, so text cannot be read for it; give one with --tokenizer (a folder, a Hub model, or bytes)"
)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def load(
    name: str, *, config_name: str | None = None, revision: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Load all splits of a dataset.

    Args:
        name: a ``.txt``, ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, a folder of such files or of images
            (one subfolder per class), the name of a dataset on the Hub, or ``pydoc_topics`` / ``digits``.
        config_name, revision: configuration and revision of a Hub dataset.
        streaming: read rows during iteration instead of all at once.

    Raises:
        DataError: the dataset does not exist or cannot be read.
    """
    if name in BUILT_IN:
        splits = BUILT_IN[name]()
        return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}) if streaming else splits
    path = Path(name)
    try:
        if path.is_file():
            if path.suffix.lower() not in BUILDERS:
                raise DataError(f"{name}: a data file must end in one of {', '.join(BUILDERS)}")
            if path.stat().st_size == 0:
                raise DataError(f"{name} is empty")
            return load_files([str(path)], streaming)
        if path.is_dir():
            suffixes = {p.suffix.lower() for p in path.rglob("*") if p.is_file()}
            if suffixes & IMAGE_SUFFIXES:
                return datasets.load_dataset("imagefolder", data_dir=str(path), streaming=streaming)
            if files := files_of(path):
                return load_files(files, streaming)
            raise DataError(f"{name} contains no images and no file ending in one of {', '.join(BUILDERS)}")
        if path.suffix in BUILDERS or name.startswith(("/", ".")):
            raise DataError(f"{name} does not exist")
        return datasets.load_dataset(name, config_name, revision=revision, streaming=streaming)
    except DataError:
        raise
    except Exception as error:  # datasets raises many types, from pyarrow's to huggingface_hub's
        raise DataError(
            f"dataset {name!r} cannot be read as a file, a folder or a Hub dataset (built in: {', '.join(BUILT_IN)}): "
            f"{why_unreadable(name, error)}"
        ) from error


def commit_of(name: str, *, config_name: str | None = None, revision: str | None = None) -> str | None:
    """The full commit hash of a Hub dataset; None if the dataset is local or unreadable."""
    if name in BUILT_IN or Path(name).exists() or Path(name).suffix in BUILDERS or name.startswith(("/", ".")):
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
        ConfigError: ``block_size`` is less than 2 or exceeds the context length.
    """
    if checkpoint.tokenizer is None:
        raise DataError(NO_TOKENIZER.format(checkpoint.model.name_or_path))
    context = getattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", None) or 1024
    size = arguments.block_size or min(context, 1024)
    if not 2 <= size <= context:
        raise ConfigError(f"block_size {size}: must be between 2 and the model's context length of {context}")
    return size


def text_blocks(
    dataset: Dataset, tokenizer, block_size: int, column: str | None = None, name: str = "dataset"
) -> Dataset:
    """Tokenize documents, separated by the EOS token, and pack them into blocks of exactly ``block_size`` tokens.

    The columns ``input_ids`` and ``labels`` are equal: a causal LM shifts the labels itself. The last partial block is
    dropped.
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
        raise DataError(f"{name} has less than one block of {block_size} tokens")
    return packed.with_format("torch")


def text_chunks(dataset: Dataset, tokenizer, size: int, name: str = "dataset") -> Dataset:
    """Tokenize each document into chunks of at most ``size`` tokens, with the special tokens of the model.

    The column is ``input_ids``, with varying lengths.
    """
    column = text_column(dataset, None, name)

    def tokens(batch):
        chunks = tokenizer(batch[column], truncation=True, max_length=size, return_overflowing_tokens=True)
        return {"input_ids": chunks["input_ids"]}

    chunks = dataset.map(tokens, batched=True, batch_size=256, remove_columns=dataset.column_names)
    return chunks.with_format("torch")


def text_column(dataset: Dataset, column: str | None, name: str) -> str:
    """The given column, else ``text``, else the only text column."""

    def is_text(feature):
        return isinstance(feature, Value) and "string" in feature.dtype

    column = _column(dataset, column, ("text",), is_text, "text", name)
    if not is_text(dataset.features[column]):
        raise DataError(f"{name}: column {column!r} does not contain text")
    return column


def images(
    dataset: Dataset,
    processor,
    image_column: str | None = None,
    label_column: str | None = None,
    name: str = "dataset",
    known: list[str] | None = None,
) -> Dataset:
    """``pixel_values`` (C, H, W) float32 and ``labels`` int64, decoded and processed on access.

    Labels are renumbered as in ``known``, the classes of the model, if it contains them all. Integer labels are kept.
    """
    image_column = _column(dataset, image_column, ("image", "img"), lambda f: isinstance(f, Image), "image", name)
    label_column = class_column(dataset, label_column, name)
    dataset = dataset.select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))
    dataset = with_classes(dataset, label_column, known or [], name)

    def transform(batch):
        pictures = [picture(row, name) for row in batch[image_column]]
        return {"pixel_values": processor(pictures, return_tensors="pt")["pixel_values"], "labels": batch[label_column]}

    return dataset.with_transform(transform)


def picture(row: dict, name: str):
    """Decode a row of an undecoded image column as an RGB PIL image."""
    try:
        return Image().decode_example(row).convert("RGB")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{name} contains an image that cannot be decoded: {error}") from error


def class_column(dataset: Dataset, column: str | None, name: str) -> str:
    """The given column, else ``label`` or ``labels``, else the only ``ClassLabel`` column."""
    return _column(dataset, column, ("label", "labels"), lambda f: isinstance(f, ClassLabel), "label", name)


def with_classes(dataset: Dataset, column: str, known: list[str], name: str) -> Dataset:
    """``column`` as ``ClassLabel``, renumbered as in ``known`` if it contains all classes. Integer labels are kept."""
    feature, labels = dataset.features[column], dataset[column][:]
    if isinstance(feature, Value) and "int" in feature.dtype:
        if min(labels) < 0:
            raise DataError(f"{name}: column {column!r} contains the negative label {min(labels)}")
        names = known if max(labels) + 1 == len(known) else [str(i) for i in range(max(labels) + 1)]
    elif isinstance(feature, ClassLabel):
        names = feature.names
    else:
        names = sorted(set(map(str, labels)))
        labels = [names.index(str(label)) for label in labels]
    if set(names) <= set(known):
        labels, names = [known.index(names[label]) for label in labels], known
    return dataset.remove_columns(column).add_column(column, labels, feature=ClassLabel(names=names))


def class_names(dataset: Dataset) -> list[str]:
    """The class names of a dataset prepared by ``images``."""
    return next(f for f in dataset.features.values() if isinstance(f, ClassLabel)).names


def _column(dataset: Dataset, requested: str | None, usual: tuple[str, ...], fits, kind: str, name: str) -> str:
    if requested:
        if requested not in dataset.column_names:
            raise DataError(f"{name} has no column {requested!r}; it has: {', '.join(dataset.column_names)}")
        return requested
    matching = [c for c, f in dataset.features.items() if fits(f)]
    for candidate in (*usual, *(matching if len(matching) == 1 else ())):
        if candidate in dataset.column_names:
            return candidate
    raise DataError(
        f"{name} has no unambiguous {kind} column (columns: {', '.join(dataset.column_names)}); "
        f"name it with --{kind}_column"
    )
