"""Replace local paths in the files that a push uploads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME
from yaml import YAMLError

from ..checkpoints.adapter import ADAPTER_CONFIG
from ..checkpoints.carry import CARD
from ..conversion.report import REPORT_FILE
from ..errors import ConfigError
from ..files import explain, written
from .card.base import Base
from .card.loading import BEGIN

# Keys with the name of the base model, and the key with its commit beside them.
BASES = {"source_model": "source_revision", "base_model_name_or_path": "base_commit"}
PATH = re.compile(r"(~|\.\.|[A-Za-z]:)?[/\\]")  # an absolute path, or one that leads out of the current folder
COMMAND = re.compile(r"^hf-ortho .*$|(?<=`)hf-ortho [^`\n]*(?=`)", re.MULTILINE)


def without_paths(files: Mapping[str, bytes], base_model: str | None = None) -> dict[str, bytes]:
    """Replace the local paths in the JSON files and the card of a model.

    A path becomes its last part, that of a snapshot in the cache of the Hub its Hub id, and that of the base model
    becomes ``base_model``, if given. Other files and values are unchanged.

    Args:
        files: name and content of each file: README.md and JSON files.
        base_model: Hub id of the base model.

    Raises:
        ConfigError: the metadata of the card cannot be read.
    """
    paths, done = _Paths(base_model), dict(files)
    for name in sorted(files, key=lambda name: name == REPORT_FILE):  # after the config, which has the base model
        with contextlib.suppress(ValueError, RecursionError):
            plain = json.loads(files[name]) if name.endswith(".json") else None
            if (new := paths.value(plain)) != plain:
                done[name] = (json.dumps(new, indent=2) + "\n").encode()
    if CARD in files:
        done[CARD] = _card(files[CARD].decode(), paths.replaced, base_model).encode()
    return done


def remove_paths(folder: str | os.PathLike) -> None:
    """Apply ``without_paths`` to the card and the configs in a folder, before another library uploads it."""
    files = {name: Path(folder, name) for name in (CARD, REPORT_FILE, CONFIG_NAME, ADAPTER_CONFIG)}
    texts = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    for name, text in without_paths(texts).items():
        if text != texts[name]:
            with written(files[name]) as draft:
                draft.write_bytes(text)


def check_base(name: str | None) -> None:
    """Raise ConfigError if the name of a base model, if any, is not a Hub id."""
    with contextlib.suppress(HFValidationError):
        validate_repo_id("x" if name is None else name)
        return
    raise ConfigError(f"base model {name!r}: must be a Hub id, such as openai-community/gpt2")


class _Paths:
    """Replaces the local paths in JSON values; ``replaced`` has each replaced text and what it became."""

    def __init__(self, base_model: str | None):
        self.base_model = base_model
        self.replaced: dict[str, str] = {}

    def value(self, value: Any, key: str = "", beside: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """The value without local paths; ``key`` and ``beside``: where it is."""
        if isinstance(value, dict):
            new = {name: self.value(item, name, value) for name, item in value.items()}
            for name, commit in BASES.items():
                if name in value and new[name] != value[name]:  # the commit is of another repository
                    new |= {key: None for key in (commit, "revision") if key in value}
            return new
        if isinstance(value, list):
            return [self.value(item, key, beside) for item in value]
        if not isinstance(value, str) or not value:
            return value
        text = self._text(value, key, beside)
        if text != value:
            self.replaced[value] = text
        return text

    def _text(self, text: str, key: str, beside: Mapping[str, Any]) -> str:
        path = bool(re.search(r"[/\\]", text))
        if text in self.replaced and (path or key in BASES or key.endswith(("name", "path", "file"))):
            return self.replaced[text]
        if key in ("command", "commands"):
            return shortened(text)
        if key in BASES:
            return self.base_model or public_name(text, beside.get(BASES[key]))
        named = key.endswith(("model", "name", "path", "file", "dir"))
        if PATH.match(text) and (named or (len(Path(text).parts) > 2 and _is_here(text))):
            return public_name(text)
        return text


def _is_here(path: str) -> bool:
    return os.path.exists(path) or path.startswith((os.path.expanduser("~") + os.sep, "~"))


def public_name(name: str, revision: Any = None) -> str:
    """The Hub id of a model, or the last part of a local path."""
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name)
    if cached:
        return cached[1].replace("--", "/", 1)
    if Base(name, revision if isinstance(revision, str) else None).on_hub:
        return name
    with contextlib.suppress(HFValidationError, OSError, ValueError):
        validate_repo_id(name)
        if not Path(name).exists():
            return name
    return _last_part(name)


def shortened(command: str) -> str:
    """A command with the last part of each path that is absolute or leads out of the current folder.

    Example:
        >>> from hf_ortho.hub.local_paths import shortened
        >>> shortened("hf-ortho convert /home/me/gpt2 -o ../out --calibration-data text/mine.txt")
        'hf-ortho convert gpt2 -o out --calibration-data text/mine.txt'
    """
    try:
        words = shlex.split(command)
    except ValueError:  # not a shell command
        words = command.split()
    if not any(map(_with_path, words)):
        return command
    return shlex.join(_with_path(word) or word for word in words)


def _with_path(word: str) -> str | None:
    """The word with the last part of its path, None if it has none; ``--flag=/a/b`` has one too."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if PATH.match(value):
        return f"{flag}{equals}{public_name(value)}"
    inner = re.sub(r"""(?<=["'])(?:~|\.\.)?/[^"']+(?=["'])""", lambda match: _last_part(match[0]), value)
    return f"{flag}{equals}{inner}" if inner != value else None


def _last_part(path: str) -> str:
    pure = PureWindowsPath(path) if "\\" in path else Path(path)
    return pure.name if pure.name not in ("", "..") else Path(path).absolute().resolve().name or "folder"


def _card(text: str, replaced: Mapping[str, str], base_model: str | None) -> str:
    if named := re.search(r"^base_model: *((?:~|\.\.)?/\S+)$", text, re.MULTILINE):  # in a card of another library
        replaced = {named[1]: public_name(named[1]), **replaced}
    for paths, around in (
        ([old for old in replaced if re.search(r"[/\\]", old)], (r"(?<![\w/.~-])", r"(?![\w-])")),
        ([old for old in replaced if not re.search(r"[/\\]", old)], ("(?<=[`\"'])", "(?=[`\"'])")),  # may be any word
    ):
        longest_first = "|".join(map(re.escape, sorted(paths, key=len, reverse=True)))
        if longest_first:
            pattern = f"{around[0]}({longest_first}){around[1]}"
            text = re.sub(pattern, lambda match: replaced[match[0]], text)
    if BEGIN in text:
        text = COMMAND.sub(lambda match: shortened(match[0]), text)
    if base_model is None:
        return text
    try:
        card = ModelCard(text)
    except (ValueError, YAMLError) as error:
        raise ConfigError(f"{CARD}: its metadata cannot be read: {explain(error)}") from error
    card.data["base_model"] = base_model
    card.data["base_model_relation"] = "adapter" if card.data.get("library_name") == "peft" else "finetune"
    return str(card)
