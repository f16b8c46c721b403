"""Explain why local data cannot be read: the file, and the line, byte or column."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..errors import DataError
from ..files import explain
from .shards import COMPRESSIBLE, builder_of, files_of, load_files, split_of

OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def why_unreadable(name: str, error: Exception) -> str:
    """Explain an error: the faulty file and the reason for a local dataset, else the message of the error.

    All files are read again because the error does not name the file.
    """
    try:
        files = files_of(name)
    except DataError:
        return explain(error)
    columns: dict[str, set[str]] = {}
    for file in files:
        place = "" if file == name else f"{file}: "
        try:
            for row in load_files({"train": [file]}, streaming=True)["train"]:
                before = columns.setdefault(split_of(file, name), set(row))
                if missing := before - set(row):
                    return f"{place}has {', '.join(row)} but lacks column {', '.join(missing)} of the files before it"
                if further := set(row) - before:
                    return f"{place}has column {', '.join(further)}, which the files before it lack"
        except Exception as file_error:
            return place + (_fault(file) or explain(file_error))
    return explain(error) if columns else "it has no rows"


def check_header(file: str) -> None:
    """Raise DataError if a CSV file has two columns of the same name: pandas would rename one."""
    builder = builder_of(file)
    if builder is None or builder[0] != "csv" or file.lower().endswith(".zst"):
        return
    try:
        with _opened(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", "replace", newline="") as text:
            header = next(csv.reader(text, delimiter=builder[1].get("sep", ",")), [])
    except (OSError, EOFError, csv.Error, lzma.LZMAError):  # loading reports the reason
        return
    name, times = next(iter(Counter(filter(str.strip, header)).most_common(1)), ("", 1))  # unnamed ones get names
    if times > 1:
        raise DataError(f"{file} has {times} columns named {name!r}; rename all but one")


def _fault(file: str) -> str:
    """The first byte that is not UTF-8, or the first line that is not JSON; empty if there is neither."""
    builder = builder_of(file)
    if builder is None or builder[0] not in COMPRESSIBLE or file.lower().endswith(".zst"):
        return ""
    try:
        with _opened(file) as stream:
            fault = _not_utf8(stream)
        if fault or builder[0] != "json":
            return fault
        with _opened(file) as stream:
            return _not_json(stream)
    except (OSError, EOFError, lzma.LZMAError):
        return ""


def _opened(file: str) -> IO[bytes]:
    return OPEN.get(Path(file).suffix.lower(), open)(file, "rb")


def _not_utf8(stream: IO[bytes]) -> str:
    decoder, position, line, block = codecs.getincrementaldecoder("utf-8")(), 0, 1, b"start"
    while block:
        block = stream.read(1 << 20)
        try:
            line += decoder.decode(block, final=not block).count("\n")
        except UnicodeDecodeError as error:  # its object starts with the bytes left over from the block before
            position += len(block) - len(error.object) + error.start
            line += error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            encoding = "UTF-16" if position == 0 and byte in (0xFE, 0xFF) else "LATIN1"
            return (
                f"not UTF-8: byte {byte:#04x} at position {position} (line {line}); convert the file, for example with "
                f"iconv -f {encoding} -t UTF-8"
            )
        position += len(block)
    return ""


def _not_json(stream: IO[bytes]) -> str:
    """The place and reason, for one value per line or, if the first line is not a value, for a single value."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            if number > 1:
                return f"line {number} is not JSON: {error.msg}: column {error.colno}"
            break
    else:
        return ""
    try:
        json.loads((line + stream.read()).decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is not JSON: {error.msg}: column {error.colno}"
    return ""
