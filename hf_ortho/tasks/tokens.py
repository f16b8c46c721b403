"""The token cache: a text dataset tokenized once, in memory-mapped files that all trainings on it share."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable
from filelock import FileLock

from ..errors import DataError
from ..files import checksum, explain, written
from .columns import text_column
from .data import too_short
from .faults import why_unreadable
from .packing import DOCUMENTS, Packer

logger = logging.getLogger("hf_ortho")

VERSION = 2  # of the layout of a cache
MANIFEST = "tokens.json"  # written last: a folder without it is incomplete
ROW = 4 * DOCUMENTS  # documents in one row of a cache
BYTES = 16 << 20  # of text that a process of its own is started for
BLOCK = "block"  # the column with the number of a block


class Tokens:
    """The tokens of a cache as one sequence; ``tokens[a:b]`` reads these alone."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        self.parts = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in rows.data.column("tokens").chunks]
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __reduce__(self):  # the names of the files, not their content: each dataloader worker may get a copy
        return Tokens, (self.rows,)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, place: slice) -> np.ndarray:
        found, start = [], place.start
        while start < place.stop:
            i = int(np.searchsorted(self.ends, start, side="right"))
            base, stop = self.ends[i] - len(self.parts[i]), min(place.stop, self.ends[i])
            found.append(self.parts[i][start - base : stop - base])
            start = stop
        return np.concatenate(found)


class Cut:
    """Makes samples from the numbers of blocks; the transform of a dataset."""

    def __init__(self, tokens: Tokens, block_size: int) -> None:
        self.tokens, self.block_size = tokens, block_size

    def __call__(self, rows: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        size = self.block_size
        blocks = np.stack([self.tokens[i * size : (i + 1) * size] for i in rows[BLOCK]]).astype(np.int64)
        return {key: torch.from_numpy(blocks) for key in ("input_ids", "labels")}


def cached_blocks(
    dataset: Dataset, tokenizer: Any, block_size: int, column: str | None = None, name: str = "dataset"
) -> Dataset:
    """The samples of ``data.text_blocks``, from a token cache, which is written if there is none.

    Raises:
        DataError: as ``cached_tokens``, or there is less than one block.
    """
    tokens, fingerprint = cached_tokens(dataset, tokenizer, column, name)
    if len(tokens) < block_size:
        raise DataError(too_short(name, len(tokens), block_size))
    return numbered(len(tokens) // block_size, Cut(tokens, block_size), [fingerprint, block_size])


def numbered(count: int, transform: Callable[[dict], dict], key: list[Any]) -> Dataset:
    """A dataset of the numbers of blocks, which ``transform`` makes samples from; ``key`` identifies it."""
    numbers = pa.table({BLOCK: np.arange(count)})
    return Dataset(InMemoryTable(numbers), fingerprint=Hasher.hash(key)).with_transform(transform)


def cached_tokens(
    dataset: Dataset, tokenizer: Any, column: str | None = None, name: str = "dataset", end: int | None = None
) -> tuple[Tokens, str]:
    """The tokens of a dataset from its token cache, and the name of the cache; ``end`` as in ``Packer``.

    A cache is identified by the fingerprint of the dataset, the text column and the content of the tokenizer, but not
    by a block size: blocks are cut when they are read. Several processes may call this at once: one writes, the others
    wait for a lock on a file.

    Raises:
        DataError: there is no text column, the dataset cannot be read, or the cache cannot be written.
    """
    column = text_column(dataset, column, name)
    if not len(dataset):
        return Tokens(Dataset.from_dict({"tokens": []}, Features({"tokens": List(Value("uint16"))}))), ""
    end = tokenizer.eos_token_id if end is None else end
    fingerprint = Hasher.hash([VERSION, dataset._fingerprint, column, *content_of(tokenizer), end])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_ortho_tokens" / fingerprint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            rows = _opened(folder)
            if rows is None:
                _write(folder, dataset.select_columns([column]), tokenizer, name, end)
                rows = _opened(folder)
            elif os.environ.get("RANK", "0") == "0":
                logger.warning(f"note: {name} is read from its {_described(rows)} in {folder}")
    except OSError as error:
        raise DataError(f"{name}: the token cache {folder} cannot be read or written: {explain(error)}") from error
    if rows is None:
        raise DataError(f"{name}: the token cache {folder} was changed by another program; try again")
    return Tokens(rows), fingerprint


def content_of(tokenizer: Any) -> list[Any]:
    """What determines the tokens of a text, without truncation and padding, which earlier calls leave behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer]
    rules = json.loads(backend.to_str())
    rules |= {"truncation": None, "padding": None}
    return [json.dumps(rules, sort_keys=True)]


def _write(folder: Path, documents: Dataset, tokenizer: Any, name: str, end: int | None) -> None:
    """Write the cache: a file for each of several processes, then the manifest."""
    shutil.rmtree(folder)
    folder.mkdir()
    largest = max(tokenizer.get_vocab().values(), default=0)
    dtype = "uint16" if largest < 2**16 else "uint32"
    size = documents.data.nbytes
    processes = max(1, min(_cores(), size // BYTES, len(documents) // ROW))
    start = time.perf_counter()
    try:
        rows = documents.map(
            _tokenized,
            batched=True,
            batch_size=ROW,
            writer_batch_size=16,
            num_proc=processes if processes > 1 else None,
            fn_kwargs={"pack": Packer(tokenizer, 1, end), "dtype": dtype},
            remove_columns=documents.column_names,
            features=Features({"tokens": List(Value(dtype))}),
            cache_file_name=str(folder / "tokens.arrow"),
            new_fingerprint=folder.name,
            load_from_cache_file=False,
        )
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except Exception as error:  # a string that is not UTF-8, and whatever datasets raises for a damaged file
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(f"dataset {name!r} cannot be read: {why_unreadable(name, error)}") from error
    seconds = time.perf_counter() - start
    tokens = len(Tokens(rows))
    files = {file.name: [_state(file), checksum(file)] for file in _files(folder)}
    _record(folder, tokens, files)
    by = f" by {processes} processes" if processes > 1 else ""
    logger.warning(
        f"note: {name} was tokenized in {seconds:.1f} s{by}: {_described(rows)} in {folder}, {tokens / seconds:,.0f}/s"
    )


def _tokenized(batch: dict[str, list], pack: Packer, dtype: str) -> dict[str, list[np.ndarray]]:
    """One row with the tokens of all documents of a batch."""
    (texts,) = batch.values()
    parts = [pack(texts[i : i + DOCUMENTS]).ravel() for i in range(0, len(texts), DOCUMENTS)]
    return {"tokens": [np.concatenate(parts).astype(dtype)]}


def _state(file: Path) -> list[int]:
    """Size and time of the last change. The content of a file whose state is as recorded is not read again."""
    return [file.stat().st_size, file.stat().st_mtime_ns]


def _record(folder: Path, tokens: int, files: dict[str, Any]) -> None:
    with written(folder / MANIFEST) as draft:
        draft.write_text(json.dumps({"tokens": tokens, "files": files}), encoding="utf-8")


def _opened(folder: Path) -> Dataset | None:
    """The rows of a cache, or None if it is absent, incomplete or damaged.

    Files that were copied or changed since they were written are compared by their checksums.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = _files(folder)
        recorded = manifest["files"]
        if {file.name for file in files} != set(recorded):
            raise ValueError("a file is missing")
        changed = [file for file in files if _state(file) != recorded[file.name][0]]
        for file in changed:
            if checksum(file) != recorded[file.name][1]:
                raise ValueError(f"{file.name} has another content")
            recorded[file.name][0] = _state(file)
        if changed:
            _record(folder, manifest["tokens"], recorded)
        rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
        if len(Tokens(rows)) != manifest["tokens"]:
            raise ValueError("it has another number of tokens")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        logger.warning(f"note: the token cache {folder} is damaged ({explain(error)}) and is written again")
        return None
    return rows


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def _described(rows: Dataset) -> str:
    tokens = Tokens(rows)
    megabytes = sum(part.nbytes for part in tokens.parts) / 1e6
    return f"{len(tokens):,} tokens ({megabytes:,.1f} MB)"


def _cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
