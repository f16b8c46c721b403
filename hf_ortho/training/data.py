"""Text and images from local files, the Hub, or what the dependencies carry."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value

from ..errors import DataError

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def pydoc_topics() -> DatasetDict:
    """CPython's help texts (``pydoc_data.topics``, English): each paragraph once, every tenth held back."""
    from pydoc_data.topics import topics

    paragraphs = list(dict.fromkeys(p for _, text in sorted(topics.items()) for p in text.split("\n\n") if p.strip()))
    held_back = paragraphs[9::10]
    del paragraphs[9::10]

    def documents(part: list[str]) -> Dataset:
        return Dataset.from_dict({"text": ["\n\n".join(part[i : i + 50]) for i in range(0, len(part), 50)]})

    return DatasetDict(train=documents(paragraphs), validation=documents(held_back))


def digits() -> DatasetDict:
    """scikit-learn's ``load_digits``: 1,797 real 8 x 8 scans of handwritten digits, every fifth held back."""
    try:
        from PIL import Image as PILImage
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits dataset needs {error.name}: pip install 'hf_ortho[vision]'") from error
    data = load_digits()
    features = datasets.Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in range(10)])})

    def part(rows: list[int]) -> Dataset:
        images = [PILImage.fromarray((data.images[i] * 15.9375).astype("uint8")).resize((32, 32)) for i in rows]
        return Dataset.from_dict({"image": images, "label": [int(data.target[i]) for i in rows]}, features=features)

    everything = range(len(data.images))
    return DatasetDict(train=part([i for i in everything if i % 5 != 4]), validation=part(list(everything)[4::5]))


BUILT_IN = {"pydoc_topics": pydoc_topics, "digits": digits}


def load(name: str, *, config_name: str | None = None, revision: str | None = None) -> DatasetDict:
    """All splits of a dataset.

    Args:
        name: a ``.txt``, ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, a folder of such files or of images
            (one subfolder per class), the name of a dataset on the Hub, or ``pydoc_topics`` / ``digits``.
        config_name, revision: of a dataset on the Hub.

    Raises:
        DataError: it does not exist or cannot be read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in BUILDERS:
                raise DataError(f"{name}: a data file must end in one of {', '.join(BUILDERS)}")
            if path.stat().st_size == 0:
                raise DataError(f"{name} is empty")
            return _from_files(path.suffix, str(path))
        if path.is_dir():
            suffixes = {p.suffix.lower() for p in path.rglob("*") if p.is_file()}
            if suffixes & IMAGE_SUFFIXES:
                return datasets.load_dataset("imagefolder", data_dir=str(path))
            for suffix in BUILDERS:
                if suffix in suffixes:
                    return _from_files(suffix, sorted(str(p) for p in path.rglob(f"*{suffix}")))
            raise DataError(f"{name} holds no images and no file ending in one of {', '.join(BUILDERS)}")
        if path.suffix in BUILDERS or name.startswith(("/", ".")):
            raise DataError(f"{name} does not exist")
        return datasets.load_dataset(name, config_name, revision=revision)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds, from pyarrow's to huggingface_hub's
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"dataset {name!r} cannot be read as a file, a folder or a Hub dataset (built in: {', '.join(BUILT_IN)}): "
            f"{reason}"
        ) from error


def _from_files(suffix: str, files) -> DatasetDict:
    # A text file is one document: its line breaks are part of the text.
    options = {"sample_by": "document"} if suffix == ".txt" else {}
    return datasets.load_dataset(BUILDERS[suffix], data_files=files, **options)


def split(splits: DatasetDict, train: str | None, held_back: str | None, name: str, fraction: float = 0.1):
    """Training and evaluation sets: the splits named, else train and validation or test, else a share held back."""
    for wanted in (train, held_back):
        if wanted and wanted not in splits:
            raise DataError(f"dataset {name!r} has no split {wanted!r}; it has: {', '.join(splits)}")
    train = train or ("train" if "train" in splits else next(iter(splits)))
    held_back = held_back or next(
        (s for s in ("validation", "valid", "dev", "test") if s in splits and s != train), None
    )
    if held_back:
        return splits[train], splits[held_back]
    if splits[train].num_rows < 2:
        return splits[train], None
    parts = splits[train].train_test_split(test_size=fraction, seed=0)
    return parts["train"], parts["test"]


def text_blocks(
    dataset: Dataset, tokenizer, block_size: int, column: str | None = None, name: str = "dataset"
) -> Dataset:
    """Tokenise and pack into blocks of exactly ``block_size`` tokens, documents separated by the EOS token.

    Columns of the result: ``input_ids`` and ``labels`` (equal; a causal LM shifts them itself). The last partial block
    is dropped.
    """
    column = _column(dataset, column, ("text",), lambda f: isinstance(f, Value) and "string" in f.dtype, "text", name)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def tokens(batch):
        texts = [t for t in batch[column] if t]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return {"stream": [[token for document in encoded for token in (*document, *end)]]}

    streams = dataset.map(tokens, batched=True, batch_size=256, remove_columns=dataset.column_names)
    flat = [token for row in streams["stream"] for token in row]
    count = len(flat) // block_size
    if not count:
        raise DataError(f"{name} has {len(flat)} tokens, less than one block of {block_size}")
    blocks = [flat[i * block_size : (i + 1) * block_size] for i in range(count)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")


def images(
    dataset: Dataset, processor, image_column: str | None = None, label_column: str | None = None, name: str = "dataset"
) -> Dataset:
    """``pixel_values`` (C, H, W) float32 and ``labels`` int64, decoded and processed on access."""
    image_column = _column(dataset, image_column, ("image", "img"), lambda f: isinstance(f, Image), "image", name)
    label_column = _column(
        dataset, label_column, ("label", "labels"), lambda f: isinstance(f, ClassLabel), "label", name
    )
    if not isinstance(dataset.features[image_column], Image):
        dataset = dataset.cast_column(image_column, Image())
    if not isinstance(dataset.features[label_column], ClassLabel):
        dataset = dataset.class_encode_column(label_column)

    def transform(batch):
        pictures = [picture.convert("RGB") for picture in batch[image_column]]
        return {"pixel_values": processor(pictures, return_tensors="pt")["pixel_values"], "labels": batch[label_column]}

    return dataset.select_columns([image_column, label_column]).with_transform(transform)


def class_names(dataset: Dataset) -> list[str]:
    """The names of the classes of a dataset from ``images``."""
    return next(f for f in dataset.features.values() if isinstance(f, ClassLabel)).names


def _column(dataset: Dataset, wanted: str | None, usual: tuple[str, ...], fits, kind: str, name: str) -> str:
    if wanted:
        if wanted not in dataset.column_names:
            raise DataError(f"{name} has no column {wanted!r}; it has: {', '.join(dataset.column_names)}")
        return wanted
    fitting = [c for c, f in dataset.features.items() if fits(f)]
    for candidate in (*usual, *(fitting if len(fitting) == 1 else ())):
        if candidate in dataset.column_names:
            return candidate
    raise DataError(
        f"{name} has no {kind} column that can be told from the others ({', '.join(dataset.column_names)}): "
        f"name it with --{kind}_column"
    )
