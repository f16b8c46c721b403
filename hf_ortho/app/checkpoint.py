"""The activations of a checkpoint for the web page."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

from huggingface_hub import model_info, scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE
from matplotlib.figure import Figure
from transformers.activations import ACT2FN
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..checkpoints.activations import load_activations
from ..checkpoints.adapter import ADAPTER_CONFIG, adapter_config, base_revision
from ..conversion.summary import OVER_GROUPS, examine
from ..errors import CheckpointError
from ..files import explain
from ..path_patterns import split_shared
from ..plotting import Panel, draw_activations
from ..plotting.layout import MAX_PANELS

COLUMNS = ["*", "activation", "domain", "tail slopes", "E f²", "E f'²", "sup f", "rms f"]
HUB_NAME = re.compile(r"\w[\w.-]{,95}(/\w[\w.-]{,95})?")
REVISION = re.compile(r"\w[\w.-]{,99}(/\w[\w.-]{,99}){,9}")
JSON_FILES = (CONFIG_NAME, ADAPTER_CONFIG, SAFE_WEIGHTS_INDEX_NAME)  # read by ``load_activations``
LARGEST_JSON = 10e6  # bytes
LARGEST = 2e9  # maximum download in bytes
CACHE = 10e9  # maximum size of the Hub cache in bytes


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A summary of at most 64 activations of a checkpoint: title, table rows, notes, figure and commands."""

    title: str
    rows: list[list[str]]
    notes: list[str]
    figure: Figure
    commands: str


def shapes(name: str, revision: str = "", *, public: bool = False) -> Shapes:
    """Read and plot the activations of a folder or Hub model.

    Args:
        public: only accept Hub models, with at most 2 GB of weights and 10 MB per JSON file. This includes the base
            model of an adapter, of which only the config is read.

    Raises:
        CheckpointError: the checkpoint does not exist, or ``public`` does not allow it.
        ConfigError: the model has no learnable activations.
    """
    name, revision = name.strip(), revision.strip()
    if not name:
        raise CheckpointError(f"no checkpoint given; enter OWNER/NAME on the Hub{'' if public else ' or a folder'}")
    commit = revision or None
    if public:
        commit = _check_public(name, revision)
        _check_base(name, commit)
    stored = load_activations(name, revision=commit, most=MAX_PANELS)
    layers, notes = examine(stored)
    pattern, rows = split_shared(list(stored.modules))
    count = len(layers) + stored.left_out
    title = f"{count} activations at {pattern}, source {', '.join(sorted({x.source or 'unknown' for x in layers}))}"
    if any(layer.module.groups > 1 for layer in layers):
        notes = [OVER_GROUPS, *notes]
    if stored.left_out:
        notes = [f"{len(layers)} of {count} are shown, evenly spaced", *notes]
    if stored.commit:
        notes = [f"commit {stored.commit}", *notes]
    sources = {layer.source: ACT2FN[layer.source] for layer in layers if layer.source in ACT2FN}
    panels = [Panel(layer.path, layer.module, sources.get(layer.source)) for layer in layers]
    place = shlex.quote(name) + (f" --revision {shlex.quote(revision)}" if revision else "")
    return Shapes(
        title,
        [[row, *layer.cells()] for row, layer in zip(rows, layers, strict=True)],
        notes,
        draw_activations(panels, name),
        f"hf-ortho inspect {place} --json\nhf-ortho plot {place} -o shapes.png",
    )


def _check_base(name: str, revision: str | None) -> None:
    """Check that the base model of an adapter is on the Hub. Only its JSON files are read."""
    adapter = adapter_config(name, revision) or {}
    base = adapter.get("base_model_name_or_path")
    if not base:
        return
    try:
        _check_public(base, base_revision(adapter) or "", weights=False)
    except CheckpointError as error:
        raise CheckpointError(f"{name} is an adapter; its base model {error}") from error


def _check_public(name: str, revision: str, weights: bool = True) -> str | None:
    """Check that a model is on the Hub and small, make room in the cache, and return its commit."""
    if not HUB_NAME.fullmatch(name) or Path(name).exists():
        raise CheckpointError(f"{name!r:.200} is not a Hub model; give OWNER/NAME, such as openai-community/gpt2")
    if revision and not REVISION.fullmatch(revision):
        raise CheckpointError(f"{revision!r:.200} is not a revision; give a branch, tag or commit")
    try:
        info = model_info(name, revision=revision or None, files_metadata=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be found on the Hub: {explain(error)}") from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    large = [file for file in JSON_FILES if sizes.get(file, 0) > LARGEST_JSON]
    if large:
        raise CheckpointError(
            f"{large[0]} of {name} has {sizes[large[0]] / 1e6:.1f} MB, but this page accepts at most "
            f"{LARGEST_JSON / 1e6:g} MB"
        )
    read = (".safetensors", *JSON_FILES) if weights else JSON_FILES
    size = sum(size for file, size in sizes.items() if file.endswith(read))
    if size > LARGEST:
        raise CheckpointError(
            f"{name} has {size / 1e9:.1f} GB of weights, but this page accepts at most {LARGEST / 1e9:g} GB; run "
            f"`hf-ortho app --model {name}` on your own machine"
        )
    if Path(HF_HUB_CACHE).is_dir():  # something was downloaded before
        cache = scan_cache_dir()
        if cache.size_on_disk + size > CACHE:
            cache.delete_revisions(*(r.commit_hash for repo in cache.repos for r in repo.revisions)).execute()
    return info.sha
