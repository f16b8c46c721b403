"""Local data files: a single file, or a folder of shards."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import DatasetDict, IterableDatasetDict

from ..files import explain

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def files_of(path: Path) -> list[str]:
    """A file itself; for a folder, all files below it with the first suffix of ``BUILDERS`` that occurs, sorted."""
    if path.is_file():
        return [str(path)]
    files = sorted(str(p) for p in path.rglob("*") if p.is_file())
    kinds = ([f for f in files if Path(f).suffix.lower() == suffix] for suffix in BUILDERS)
    return next((kind for kind in kinds if kind), [])


def load_files(files: list[str], streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Load files of the same type as the split ``train``."""
    suffix = Path(files[0]).suffix.lower()
    # A text file is one document, including its line breaks. Parquet is otherwise read by whole row groups, which fails
    # for a file without rows.
    kinds: dict[str, dict] = {".txt": {"sample_by": "document"}, ".parquet": {"batch_size": 1000}}
    return datasets.load_dataset(BUILDERS[suffix], data_files=files, streaming=streaming, **kinds.get(suffix, {}))


def why_unreadable(name: str, error: Exception) -> str:
    """Explain an error: the faulty file and the reason for a local dataset, else the message of the error.

    All files are read again because the error does not name the file.
    """
    columns: set[str] = set()
    for file in files_of(Path(name)):
        try:
            for row in load_files([file], streaming=True)["train"]:
                columns = columns or set(row)
                if missing := columns - set(row):
                    return f"{file} has {', '.join(row)} but lacks column {', '.join(missing)} of the files before it"
        except Exception as file_error:
            return f"{file}: {explain(file_error)}"
    return explain(error)
