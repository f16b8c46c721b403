"""Text helpers: printable text, Markdown tables, JSON values."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# All control characters except tab and line feed, bidirectional marks, and undecodable bytes.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""``text`` with control characters escaped, for example as ``\x1b``; tabs and line feeds stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known word closest to ``word``; empty if none is close."""
    closest = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {closest[0]}?" if closest else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a ``|`` in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def change(before: float, after: float) -> str:
    """``after`` relative to ``before`` in percent, such as ``+1.250%``; ``-`` if ``before`` is 0 or not finite."""
    return f"{(after / before - 1):+.3%}" if before and math.isfinite(before) else "-"


def json_values(value: Any, not_finite: Callable[[float], Any] = lambda _: None) -> Any:
    """``value`` for JSON, which has no infinity or NaN: ``not_finite`` replaces them, by default with None."""
    if isinstance(value, Mapping):
        return {key: json_values(item, not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item, not_finite) for item in value]
    return not_finite(value) if isinstance(value, float) and not math.isfinite(value) else value


def interval(ends: Sequence[float | None]) -> tuple[float, float]:
    """The interval written by ``json_values``: an end of None is infinite."""
    lo, hi = ends
    return -math.inf if lo is None else lo, math.inf if hi is None else hi
