"""Text from files and arguments, made safe to print."""

import difflib
import re
from collections.abc import Iterable

# All controls but tab and line feed, the marks that reorder a line, and bytes that were no text.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""``text`` with controls as escapes, such as the four characters ``\x1b``; tabs and line feeds stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known word that is most like ``word``; empty if none is."""
    closest = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {closest[0]}?" if closest else ""
