"""Local data files: a single file, the files of a folder, or those of a glob pattern such as ``data/*.jsonl``."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

import datasets
from datasets import DatasetDict, IterableDatasetDict
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..errors import DataError

# A text file is one document, including its line breaks.
TEXT = ("text", {"sample_by": "document", "encoding": "utf-8-sig"})
JSON: tuple[str, dict] = ("json", {})
IMAGES: tuple[str, dict] = ("imagefolder", {})
BUILDERS: dict[str, tuple[str, dict]] = {
    ".txt": TEXT,
    ".raw": TEXT,  # of WikiText
    ".jsonl": JSON,
    ".ndjson": JSON,
    ".json": JSON,
    # Parquet is otherwise read by whole row groups, which fails for a file without rows.
    ".parquet": ("parquet", {"batch_size": 1000}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
COMPRESSIBLE = ("text", "json", "csv")
# The words that datasets looks for, too.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
KNOWN = f"one of {', '.join(BUILDERS)} (text, JSON and CSV also followed by {', '.join(COMPRESSIONS)})"


def builder_of(file: str | os.PathLike) -> tuple[str, dict] | None:
    """The builder of ``load_dataset`` for a file and its options, by the suffix of the file; None if there is none."""
    path = Path(str(file).lower())
    if path.suffix in COMPRESSIONS:
        inner = BUILDERS.get(path.with_suffix("").suffix)
        return inner if inner and inner[0] in COMPRESSIBLE else None
    return BUILDERS.get(path.suffix, IMAGES if path.suffix in ImageFolder.EXTENSIONS else None)


def split_of(file: str, name: str) -> str:
    """The split that the folders or the name of a file below the folder ``name`` tell as a word, by default ``train``.

    A text file is a document: its name must be nothing but the word and numbers, ``test.txt``, not ``test plan.txt``.
    """
    if not os.path.isdir(name):
        return "train"
    *folders, last = (part.lower() for part in Path(file).relative_to(name).parts)
    words = [re.split(r"[-._ 0-9]+", part) for part in (*folders, last)]
    if builder_of(file) == TEXT and len({*re.split(r"[-_ 0-9]+", last.partition(".")[0])} - {"", "of"}) > 1:
        words = words[:-1]
    found = (split for part in words for word in part for split, known in SPLITS.items() if word in known)
    return next(found, "train")


def is_local(name: str) -> bool:
    """Whether a name cannot be that of a Hub dataset."""
    if os.path.exists(name) or glob.has_magic(name) or name.startswith(("/", ".")):
        return True
    return builder_of(name) not in (None, IMAGES)  # many suffixes of images are too common


def files_of(name: str) -> list[str]:
    """The data files of a file name, a folder or a glob pattern, sorted, all of one type.

    If a folder has images, only the images are listed, as its other files may describe them.

    Raises:
        DataError: there are no data files, or they have several types.
    """
    path = Path(name)
    if path.is_file():
        candidates = [name]
    elif path.is_dir():
        # Hidden files and folders, such as .ipynb_checkpoints, are not data.
        below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        candidates = sorted(str(p) for p in below if p.is_file())
    elif glob.has_magic(name):
        candidates = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
    else:
        raise DataError(f"{name} does not exist")
    files = [file for file in candidates if builder_of(file)]
    if not files and path.is_dir():
        raise DataError(f"{name} contains no images and no file ending in {KNOWN}")
    if not candidates:
        raise DataError(f"{name} matches no file")
    if not files:
        raise DataError(f"{candidates[0]}: a data file must end in {KNOWN}, or be an image")
    if path.is_dir():
        files = [file for file in files if builder_of(file) == IMAGES] or files
    different = next((file for file in files if builder_of(file) != builder_of(files[0])), None)
    if different is not None:
        folder = name if path.is_dir() else os.path.dirname(files[0])
        raise DataError(
            f"{name} has data files of several types, such as {files[0]} and {different}; select one type with a "
            f"pattern, such as '{os.path.join(folder, '*' + Path(different).suffix)}'"
        )
    if not any(map(os.path.getsize, files)):
        raise DataError(f"{name} is empty")
    return files


def load_files(files: Mapping[str, list[str]], streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Load files of one type, by split."""
    builder, options = JSON
    for file in (file for part in files.values() for file in part):
        builder, options = builder_of(file) or JSON
        if file.lower().endswith(".zst") and importlib.util.find_spec("zstandard") is None:
            raise DataError(f"{file}: the compression .zst needs zstandard: pip install zstandard")
    names = {split: [glob.escape(file) for file in part] for split, part in files.items()}  # datasets reads patterns
    return datasets.load_dataset(builder, data_files=names, streaming=streaming, **options)
