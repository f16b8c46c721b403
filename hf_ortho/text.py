"""Text helpers: printable text, Markdown, JSON values."""

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


def one_line(text: str) -> str:
    r"""``text`` with all control characters escaped, line feeds too: names from files cannot pass for lines of ours."""
    return visible(text).replace("\n", r"\n").replace("\t", r"\t")


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known word closest to ``word``; empty if none is close."""
    closest = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {closest[0]}?" if closest else ""


class Markdown(str):
    """Text that is already Markdown: ``markdown`` and ``markdown_table`` do not escape it."""


# What has a meaning in CommonMark, in GitHub's Markdown or on the Hub
_SPECIAL = re.compile(
    r"""[\\`*\[\]<|~$]  # code, emphasis, links, HTML, cells, strikethrough, formulas
    | (?<![^\W_])_ | _(?![^\W_])  # emphasis; not within a word, as in gelu_new
    | &(?=\#?\w+;)  # character references
    | :(?=//|[\w+-]+:) | (?<=\bwww)\.  # addresses, emoji""",
    re.VERBOSE | re.IGNORECASE,
)
_BLOCK = re.compile(r"^( ?(?:\d{1,9}(?=[.)]))?)(?=>|(?:#{1,6}|[-+.)])(?:\s|$)|--)")  # headings, lists, quotes, rules


def markdown(value: object) -> Markdown:
    """The text of ``value`` on one line, escaped so that Markdown shows it literally, unless it is Markdown already."""
    text = value if isinstance(value, str) else str(value)
    return text if isinstance(text, Markdown) else Markdown(_BLOCK.sub(r"\1\\", _inline(text), count=1))


def code(text: str) -> Markdown:
    """``text`` as inline code in Markdown, on one line."""
    line = _one_line(text).strip() or " "
    if "\\|" in line:  # cannot be escaped in the code of a table cell
        return markdown(line)
    ticks = _longer_than_in(line)
    pad = " " if "`" in (line[0], line[-1]) else ""
    return Markdown(f"{ticks}{pad}{line}{pad}{ticks}")


def code_block(text: str, language: str = "") -> Markdown:
    """``text`` as a fenced block of code in Markdown."""
    fence = _longer_than_in(text, 3)
    return Markdown(f"{fence}{language}\n{visible(text)}\n{fence}")


def _inline(text: str) -> str:
    return text if isinstance(text, Markdown) else _SPECIAL.sub(r"\\\g<0>", _one_line(text))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", visible(text))


def _longer_than_in(text: str, least: int = 1) -> str:
    """More backticks than there are in a row in ``text``."""
    return "`" * max([least, *(len(ticks) + 1 for ticks in re.findall("`+", text))])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """A Markdown table. Cells are escaped, unless they are Markdown; a ``|`` always is."""
    lines = [header, [Markdown("---")] * len(header), *rows]
    cells = ([re.sub(r"(?<!\\)\|", r"\\|", _inline(cell)) for cell in line] for line in lines)
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in cells))


def number(value: float, spec: str) -> str:
    """``value`` formatted by ``spec``, without a sign if it is rounded to 0."""
    text = format(value, spec)
    return text if re.search("[1-9]|inf|nan", text.partition("e")[0]) else text.lstrip("+-")


def digits(value: float) -> str:
    """``value`` >= 0 with three digits, or all before the decimal point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def change(before: float, after: float) -> str:
    """``after`` relative to ``before`` in percent, such as ``+1.250%``; ``-`` if that says nothing.

    That is the case if ``before`` is 0 or not finite, or if one of them is negative, as a correlation can be.
    """
    return number(after / before - 1, "+.3%") if 0 < before < math.inf and not after < 0 else "-"


def duration(seconds: float) -> str:
    """``seconds``, roughly: ``about 10 min``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes} min" if minutes < 120 else f"about {seconds / 3600:.1f} h"


def some(names: Iterable[str], most: int = 3, what: str = "") -> str:
    """The first names, and the number of the others: ``a, b and 3 more``."""
    first, rest = list(names)[:most], list(names)[most:]
    return ", ".join(first) + (f" and {len(rest)} more{f' {what}' if what else ''}" if rest else "")


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
