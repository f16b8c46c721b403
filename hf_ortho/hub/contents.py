"""The files of a folder to push to the Hub: what its model or adapter needs, and nothing else."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoints.activations import load_activations
from ..checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_tensors
from ..checkpoints.carry import CARD
from ..checkpoints.custom_code import references
from ..checkpoints.listing import TOKENIZER, Listing, is_private, list_files, matches, module_folders, module_of
from ..checkpoints.place import GRAPH, GRAPH_DATA, has_graph
from ..checkpoints.provenance import Provenance
from ..checkpoints.weights import shapes, weight_map
from ..errors import CheckpointError, ConfigError
from ..files import MANIFEST, explain, json_object

# What a model or an adapter may need, besides its weights.
NEEDED = "config.json generation_config.json adapter_config.json labels.json conversion.json README.md activations.png "
NEEDED += "model.safetensors.index.json "
NEEDED += f"{TOKENIZER} *processor_config.json "
NEEDED += "modules.json router_config.json sentence_*_config.json config_sentence_transformers.json"
LEGAL = "LICENSE LICENSE.* LICENSE-* LICENCE LICENCE.* NOTICE NOTICE.* COPYING COPYING.* USE_POLICY.*"
OF_MODULES = "*.json *.safetensors *.txt *.model"
PICTURES = "*.png *.jpg *.jpeg *.gif *.svg *.webp"
SHOWN = re.compile(  # repetitions are bounded: the card may be of a stranger
    r"""!\[[^\]\n]{0,300}\]\(\s{0,9}<?([^)\s>]+)|<img[^<>]{0,300}?\ssrc\s{0,9}=\s{0,9}["']?([^"'\s>]+)""",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """A folder that can be pushed.

    Attributes:
        adapter: whether the folder contains an adapter but no model.
        files: files to upload, as paths in the repository.
        left_out: what is left out, with a reason if it is not a regular file of the folder. Folders end in ``/``. The
            manifest of ``OutputFolder`` is in neither list.
    """

    adapter: bool
    files: list[str]
    left_out: list[str]


def contents_of(folder: str | os.PathLike, include: Sequence[str] = ()) -> Contents:
    """Check that a folder contains a complete model or adapter, and select its files to push.

    A model has a config that transformers can read, and all weights as safetensors or in an ONNX graph. A peft adapter
    has ``adapter_config.json`` and ``adapter_model.safetensors``. Only the headers of the weights are read.

    Selected are the weights, the files of tokenizers and processors, the modules of sentence-transformers, the card
    with its pictures, the license, and what ``include`` selects.

    Args:
        include: glob patterns of further files, such as ``eval/*.json``; ``*`` also matches ``/``. Hidden files and
            files with the name of a secret, such as ``token``, must be named exactly.

    Raises:
        CheckpointError: the folder contains neither, or a file is missing, truncated, lacks an entry that another file
            lists, or is a link that leads out of the folder.
        ConfigError: a pattern selects no file, or the name of a selected file is not UTF-8.
    """
    place = Path(folder)
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long
        raise CheckpointError(f"{folder} is not a folder; give a folder with a model or an adapter")
    found = list_files(place, lambda name: name.startswith(".") or name == "__pycache__")
    _refuse(place, [path for path in found.others if _needed(path)], found)
    adapter, model = ADAPTER_CONFIG in found.sizes, CONFIG_NAME in found.sizes
    if not adapter and not model:
        raise CheckpointError(
            f"{folder} contains neither a model nor an adapter: expected {CONFIG_NAME} with {SAFE_WEIGHTS_NAME}, or "
            f"{ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}"
        )
    if adapter:
        _check_adapter(place)
    if model:
        _check_model(place)
    weights = {GRAPH, GRAPH_DATA} if model and has_graph(place) else {SAFE_WEIGHTS_NAME} if model else set()
    weights |= {ADAPTER_WEIGHTS} if adapter else set()
    if model and SAFE_WEIGHTS_INDEX_NAME in found.sizes:
        weights |= set(weight_map(place / SAFE_WEIGHTS_INDEX_NAME).values())
    modules, pictures = module_folders(place), _pictures(place) if CARD in found.sizes else set()

    def selected(path: str) -> bool:
        if path in weights or _needed(path):
            return True
        of_module = module_of(path, modules) and matches(path, OF_MODULES)
        return (of_module or (path in pictures and matches(path.lower(), PICTURES))) and not is_private(path)

    _refuse(place, [path for path in found.others if selected(path)], found)
    files = {path for path in found.sizes if selected(path)}
    for pattern in include:
        named = {path for path in found.sizes if fnmatchcase(path, pattern)}
        named = {path for path in named if path == pattern or not is_private(path)}
        if not named:
            reasons = [f": {path} is {why}" for path, why in found.others.items() if why and fnmatchcase(path, pattern)]
            raise ConfigError(f"include {pattern!r} selects no file of {folder}{next(iter(reasons), '')}")
        # Pickles too: some models need one, such as 2_Dense/pytorch_model.bin, and the user has chosen it.
        files |= named
    for path in files:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{folder}: the name of {path!r} is not UTF-8; rename the file") from error
    return Contents(adapter and not model, sorted(files), _left_out(found, files))


def _needed(path: str) -> bool:
    legal = "/" not in path and matches(path.upper(), LEGAL)
    return legal or (matches(path, NEEDED) and path.count("/") == path.startswith("additional_chat_templates/"))


def _refuse(folder: Path, paths: Sequence[str], found: Listing) -> None:
    for path in paths:
        hint = "; replace it with a copy" if "out of" in found.others[path] else ""
        raise CheckpointError(f"{folder} is incomplete: {path} is {found.others[path]}{hint}")


def _pictures(folder: Path) -> set[str]:
    """The paths of the pictures that the card shows."""
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    return {os.path.normpath(unquote(one or other)) for one, other in SHOWN.findall(text)}


def _left_out(found: Listing, files: set[str]) -> list[str]:
    """What is not pushed; a folder of which nothing is pushed by its name."""
    entered = {path.split("/")[0] for path in files}
    names = []
    for path in {*found.sizes, *found.others} - files - {MANIFEST}:
        top, slash, _ = path.partition("/")
        reason = found.others.get(path, "")
        names.append(f"{path} ({reason})" if reason else f"{top}/" if slash and top not in entered else path)
    return sorted(set(names))


def _check_model(folder: Path) -> None:
    code = references(json_object(folder / CONFIG_NAME).get("auto_map"))
    for module in sorted({path.partition(".")[0] for path in code.values() if "--" not in path}):
        if not (folder / f"{module}.py").is_file():
            raise CheckpointError(f"{folder} is incomplete: {module}.py, which {CONFIG_NAME} names, is missing")
    try:
        if "AutoConfig" not in code:  # otherwise only code could read it, which a push does not run
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds
        raise CheckpointError(f"{folder / CONFIG_NAME} cannot be read: {explain(error)}") from error
    if has_graph(folder):
        _check_graph(folder)
        return
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if not single.is_file() and not index.is_file():
        raise CheckpointError(f"{folder} is incomplete: it has a config but neither {single.name} nor {index.name}")
    if single.is_file():
        shapes(single)
    if index.is_file():
        places = weight_map(index)
        for shard in sorted(set(places.values())):
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder} is incomplete: {shard}, which {index.name} lists, is missing")
            missing = {key for key, file in places.items() if file == shard} - shapes(folder / shard).keys()
            if missing:
                raise CheckpointError(f"{folder} is incomplete: {shard} lacks {min(missing)}, which {index.name} lists")
    try:
        load_activations(str(folder))
    except ConfigError as error:  # it has none
        if Provenance.of(json_object(folder / CONFIG_NAME), str(folder)).layers:
            raise CheckpointError(
                f"{folder} is incomplete: its config names learnable activations, but its weights have none"
            ) from error


def _check_graph(folder: Path) -> None:
    options = json_object(folder / CONFIG_NAME).get("transformers.js_config") or {}
    if options.get("use_external_data_format") and not (folder / GRAPH_DATA).is_file():
        raise CheckpointError(f"{folder} is incomplete: {GRAPH_DATA}, which {CONFIG_NAME} mentions, is missing")


def _check_adapter(folder: Path) -> None:
    config = json_object(folder / ADAPTER_CONFIG)
    if "peft_type" not in config:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not name a peft_type")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is incomplete: it has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
    adapter_tensors(str(folder), config, None)  # checks that all are there, and the values of activations
