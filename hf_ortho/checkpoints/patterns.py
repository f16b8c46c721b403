"""The regular expressions in a peft config, which peft matches with every module path of a model.

For some of them, such as ``(a+)+$``, a match takes time exponential in the length of a path, and ``re`` has no limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import CheckpointError
from .adapter import PEFT_TYPE

SECONDS = 10.0
PLAIN = re.compile(r"[\w.^$\\\[\]-]*")  # without repetitions and alternatives: matched in linear time
# How peft embeds the expressions; text fields are matched as they are.
FULL = ("target_modules", "exclude_modules", "feedforward_modules")
LAYER, ITEM, KEY = r"(?:^|.*?\.)%s\.(?P<idx>\d+)\.", r"(^|.*\.)%s($|\..*)", r"(.*\.)?(%s)$"

MATCH = """
import json, re, sys

expressions, paths = json.load(sys.stdin)
for template, expression in expressions:
    try:
        match = re.compile(template.replace("%s", expression)).match if template else re.compile(expression).fullmatch
    except (re.error, RecursionError, OverflowError):
        continue  # peft reports it
    for path in paths:
        match(path)
"""


def check_patterns(config: Mapping[str, Any], paths: Iterable[str], where: str) -> None:
    """Try the regular expressions of a peft config on the module paths of a model, in a process with a time limit.

    Expressions without repetitions and alternatives are not tried, and usually there are no others.

    Raises:
        CheckpointError: matching them takes longer than ``SECONDS``.
    """
    expressions = [pair for pair in _expressions(config) if not PLAIN.fullmatch(pair[1])]
    if not expressions:
        return
    command, work = [sys.executable, "-I", "-S", "-c", MATCH], json.dumps([expressions, list(paths)])
    try:
        subprocess.run(command, input=work, text=True, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        longest = max((expression for _, expression in expressions), key=len)
        raise CheckpointError(
            f"{where}: matching its regular expressions, such as {longest!r:.80}, with the modules of the base model "
            f"takes more than {SECONDS:g} s; list the names of the modules instead"
        ) from error


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(template, expression) pairs; the template is empty for an expression that must match a whole path."""
    for key, value in config.items():
        if isinstance(value, str):
            if key == "target_modules" and config.get("peft_type") == PEFT_TYPE and config.get("layers") is not None:
                continue  # such an adapter is matched by its layers
            if key in FULL:
                yield "", value
            elif key == "layers_pattern":
                yield LAYER, value
        elif isinstance(value, list | dict):
            template = LAYER if key == "layers_pattern" else ITEM if isinstance(value, list) else KEY
            yield from ((template, item) for item in value if isinstance(item, str))
