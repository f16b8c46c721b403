"""Local data files: one, or a folder of them as the shards of one dataset."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import DatasetDict, IterableDatasetDict

from ..files import explain

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def files_of(path: Path) -> list[str]:
    """The file itself; of a folder, all below it with the first suffix of ``BUILDERS`` that occurs, sorted."""
    if path.is_file():
        return [str(path)]
    files = sorted(str(p) for p in path.rglob("*") if p.is_file())
    kinds = ([f for f in files if Path(f).suffix.lower() == suffix] for suffix in BUILDERS)
    return next((kind for kind in kinds if kind), [])


def load_files(files: list[str], streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """The rows of files of one kind as the split ``train``."""
    suffix = Path(files[0]).suffix.lower()
    # A text file is one document: its line breaks are part of the text. Parquet is otherwise read by whole row groups,
    # which fails for a file without rows.
    kinds: dict[str, dict] = {".txt": {"sample_by": "document"}, ".parquet": {"batch_size": 1000}}
    return datasets.load_dataset(BUILDERS[suffix], data_files=files, streaming=streaming, **kinds.get(suffix, {}))


def why_unreadable(name: str, error: Exception) -> str:
    """What is wrong with a dataset: the file at fault and why, if it is a local one, else the error's own reason.

    All files are read again for this, because the error does not say in which one it arose.
    """
    columns: set[str] = set()
    for file in files_of(Path(name)):
        try:
            for row in load_files([file], streaming=True)["train"]:
                columns = columns or set(row)
                if missing := columns - set(row):
                    return (
                        f"{file} has {', '.join(row)} but no column {', '.join(missing)}, as the files before it have"
                    )
        except Exception as found:
            return f"{file}: {explain(found)}"
    return explain(error)
