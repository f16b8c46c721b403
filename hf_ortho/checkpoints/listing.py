"""List the files of a model's folder without leaving it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from ..files import json_object

MODULES = "modules.json"  # of a sentence-transformers model
# What makes a folder a model of sentence-transformers.
SENTENCE = f"{MODULES} config_sentence_transformers.json sentence_*_config.json [0-9]_*"
ROUTER = "router_config.json"  # of its module Router, whose parts modules.json does not list
PRIVATE = "token *_token id_rsa* id_dsa* id_ecdsa* id_ed25519* *.pem *.key *.p12 *.pfx *.kdbx *.env *credential* "
PRIVATE += "*password* secret* *.secret htpasswd kaggle.json"
# The files of tokenizers and their chat templates.
TOKENIZER = "tokenizer*.json special_tokens_map.json added_tokens.json *vocab*.json *vocab*.txt merges.txt bpe.codes "
TOKENIZER += "tokenizer*.model* spiece.model sentencepiece*.model spm*.model *.spm *.tiktoken tekken.json dict.txt "
TOKENIZER += "normalizer.json emoji.json byte_maps.json word_shape.json word_pronunciation.json "
TOKENIZER += "chat_template.json *.jinja additional_chat_templates/*.jinja"


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a folder contains.

    Attributes:
        sizes: size in bytes of each regular file, by its POSIX path.
        others: what is not such a file, and why; a folder that was not entered ends in ``/``.
    """

    sizes: dict[str, int]
    others: dict[str, str]

    def without(self, folder: Path) -> Listing:
        """The listing without the files that another folder has too."""
        return Listing({path: n for path, n in self.sizes.items() if not os.path.lexists(folder / path)}, self.others)


def list_files(folder: Path, skipped: Callable[[str], bool]) -> Listing:
    """The files below a folder. Links to files are followed unless they lead out of it, links to folders never.

    A snapshot in the cache of the Hub consists of links to its blobs, which belong to it.

    Args:
        skipped: whether not to enter a folder with this name.
    """
    found = Listing({}, {})
    root = Path(os.path.realpath(folder))
    places = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for place, folders, names in os.walk(folder):
        here = Path(place)
        for name in list(folders):
            linked = (here / name).is_symlink()
            if linked or skipped(name):
                folders.remove(name)
                path = f"{(here / name).relative_to(folder).as_posix()}/"
                found.others[path] = "a link to a folder" if linked else ""
        for name in names:
            path = (here / name).relative_to(folder).as_posix()
            real = Path(os.path.realpath(here / name))
            try:
                status = os.stat(real)
            except OSError:
                found.others[path] = "a link to a missing file" if (here / name).is_symlink() else "not readable"
                continue
            if not stat.S_ISREG(status.st_mode):
                found.others[path] = "not a regular file"
            elif not os.access(real, os.R_OK):
                found.others[path] = "not readable"
            elif not any(real.is_relative_to(place) for place in places):
                found.others[path] = "a link that leads out of the folder"
            else:
                found.sizes[path] = status.st_size
    return found


def is_private(path: str) -> bool:
    """Whether a path looks like it holds a secret, such as ``.env``, ``token``, ``id_rsa`` or ``secrets.json``."""
    parts = PurePosixPath(path).parts
    return any(part.startswith(".") or (matches(part.lower(), PRIVATE) and not part.endswith(".py")) for part in parts)


def matches(name: str, patterns: str) -> bool:
    """Whether a name matches one of several glob patterns, separated by spaces."""
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def module_folders(folder: Path) -> set[str]:
    """The folders of the modules of a sentence-transformers model; empty for another model or an invalid list."""
    found: set[PurePosixPath] = set()
    if not (folder / MODULES).is_file():
        return set()
    with contextlib.suppress(CheckpointError, OSError, ValueError, AttributeError, TypeError, RecursionError):
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        for path in filter(_inside, (PurePosixPath(module["path"]) for module in modules)):
            router = folder / path / ROUTER
            parts = json_object(router).get("types", {}) if router.is_file() else {}
            found |= {path / part for part in ("", *parts)}
    return {path.as_posix() for path in filter(_inside, found)} - {"."}


def _inside(path: PurePosixPath) -> bool:
    return not path.is_absolute() and ".." not in path.parts


def module_of(path: str, modules: Iterable[str]) -> bool:
    """Whether a path is in the folder of a module."""
    return any(path.startswith(f"{module}/") for module in modules)
