"""Local datasets: files, folders, glob patterns, and folders written by ``save_to_disk``."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDatasetDict

from ..errors import DataError
from .faults import check_header, why_unreadable
from .shards import IMAGES, builder_of, files_of, load_files, split_of

logger = logging.getLogger("hf_ortho")

# Written by save_to_disk, for a DatasetDict and for a Dataset.
SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))


def load_local(name: str, streaming: bool = False, check: bool = True) -> DatasetDict | IterableDatasetDict:
    """All splits of a local dataset.

    The files of a folder are split by their names, as on the Hub: ``valid-0.jsonl`` and ``test/0.jsonl`` are evaluation
    data. Files whose names tell no split belong to ``train``.

    Raises:
        DataError: there are no data files, they have several types, or one cannot be read.
    """
    path = Path(name)
    try:
        if path.is_dir() and any(all((path / file).is_file() for file in files) for files in SAVED):
            return _saved(name, streaming, check)
        files = files_of(name)
        if path.is_dir() and builder_of(files[0]) == IMAGES:
            return datasets.load_dataset("imagefolder", data_dir=name, streaming=streaming)
        for file in files:
            check_header(file)
        by_split: dict[str, list[str]] = {}
        for file in files:
            by_split.setdefault(split_of(file, name), []).append(file)
        if len(by_split) > 1:
            counts = ", ".join(f"{len(part)} for {split}" for split, part in by_split.items())
            logger.warning(f"note: the {len(files)} files of {name} are used by their names: {counts}")
        splits = {split: load_files({split: part}, streaming)[split] for split, part in by_split.items()}
        return IterableDatasetDict(splits) if streaming else _checked(DatasetDict(splits), check)
    except DataError:
        raise
    except Exception as error:  # datasets raises many types, such as pyarrow's
        raise DataError(f"dataset {name!r} cannot be read: {why_unreadable(name, error)}") from error


def _saved(name: str, streaming: bool, check: bool) -> DatasetDict | IterableDatasetDict:
    """The splits of a folder written by ``save_to_disk``. A single ``Dataset`` is ``train`` unless it has a name."""
    found = datasets.load_from_disk(name).with_format(None)
    splits = DatasetDict({str(found.split or "train"): found}) if isinstance(found, Dataset) else found
    splits = _checked(splits, check)
    return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}) if streaming else splits


def _checked(splits: DatasetDict, check: bool) -> DatasetDict:
    """The splits, after a check (if ``check``) that all strings are UTF-8: pyarrow reads any bytes."""
    for part in splits.values() if check else ():
        part.data.validate(full=True)
    return splits
