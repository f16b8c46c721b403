"""Copy the files of a source model that are not its weights to a model made from it.

These are, for example, the modules of sentence-transformers, feature extractors, chat templates, custom code, and the
license.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download
from huggingface_hub.errors import HTTPError
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..files import TRAINING_MANIFEST, TRAINING_RECIPE, explain
from ..text import some
from .custom_code import GENERATED
from .listing import MODULES, ROUTER, Listing, is_private, list_files, matches, module_folders, module_of

logger = logging.get_logger("hf_ortho")

CARD = "README.md"
# Written by hf_ortho, for the model that it describes.
OURS = ("conversion.json", "activations.png", f"{GENERATED}.py")
MAIN = "model.safetensors model-*-of-*.safetensors model.safetensors.index.json"
# The weights in other files and formats, which the new weights do not match.
STALE = "*model*.safetensors* pytorch_model* model*.bin model*.pt consolidated* *.pth *.ckpt* tf_model* *.h5 "
STALE += "flax_model* *.msgpack rust_model* *.gguf *.ggml *.onnx* openvino_* *.tflite *.mlmodel *.mlpackage "
STALE += "weights*.safetensors *.npz"
TRAINING = "optimizer* scheduler* scaler* rng_state* random_states* training_args.bin trainer_state.json "
TRAINING += f"events.out.tfevents* *.distcp {TRAINING_MANIFEST} {TRAINING_RECIPE}"
SKIPPED = "checkpoint-* checkpoints* last-checkpoint global_step* runs wandb mlruns __pycache__"
LIMIT = 100 * 2**20  # bytes of a file, or of a folder with all that is in it, except the modules

SHOWN = 5  # names in a note


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder, or a Hub model with its commit."""

    name: str
    commit: str | None = None
    without: str = ""  # glob patterns of files that were replaced


def carry(source: Source, folder: Path) -> None:
    """Copy what ``folder``, which contains the saved model and its processors, lacks from the files of ``source``.

    Files of the same name in ``folder`` stay. What is left out is logged in one line: other formats of the weights,
    the state of a training, the card, links that lead out of the source, folders with another model, secrets, and
    whatever is larger than ``LIMIT``. Hidden files are ignored.
    """
    place = Path(source.name)
    found, files, missing = _cached(place, folder) if place.is_dir() else _download(source, folder)
    files = {path: file for path, file in files.items() if not matches(path, source.without)}
    for path, file in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if left_out := [*_left_out(found, {*files, *missing}), *(f"{path} (download failed)" for path in missing)]:
        logger.warning(f"note: not carried over from {source.name}: {some(left_out, SHOWN)}")


def _skipped(name: str) -> bool:
    return name.startswith(".") or matches(name, SKIPPED)


def _of_training(name: str) -> bool:
    return matches(name, TRAINING) and not name.endswith(".py")


def _pick(sizes: Mapping[str, int], modules: set[str]) -> list[str]:
    """The paths to copy. A folder that contains weights, but is not a module, is another model or another format."""
    totals: dict[str, int] = defaultdict(int)
    foreign = set()
    for path, size in sizes.items():
        if not module_of(path, modules):
            totals[path.split("/")[0]] += size
            if "/" in path and matches(path.rpartition("/")[2], STALE):
                foreign.add(path.split("/")[0])

    def wanted(path: str) -> bool:
        top, _, name = path.split("/")[0], *path.rpartition("/")[1:]
        if any(map(_skipped, path.split("/")[:-1])) or is_private(path) or _of_training(name):
            return False
        if module_of(path, modules):
            return True
        return not (matches(name, STALE) or path in (CARD, *OURS) or top in foreign or totals[top] > LIMIT)

    return sorted(filter(wanted, sizes))


def _left_out(found: Listing, files: set[str]) -> list[str]:
    """What to name: shards as one pattern, and a folder of which nothing is carried by its name."""
    entered = {path.split("/")[0] for path in files}
    names: dict[str, None] = {}
    for path in sorted({*found.sizes, *found.others} - files):
        top, _, rest = path.partition("/")
        hidden = any(part.startswith(".") for part in path.split("/"))
        silent = path in OURS or matches(path, MAIN) or (path == CARD and OURS[0] in found.sizes)
        if hidden or silent or (path in found.others and top == "__pycache__"):
            continue
        if rest and top not in entered:
            path = f"{top}/"
        reason = "the model has a new card" if path == CARD else found.others.get(path, "")
        names[re.sub(r"\d{5}(?=-of-\d{5})|(?<=^checkpoint-)\d+", "*", path) + (f" ({reason})" if reason else "")] = None
    return list(names)


def _cached(place: Path, folder: Path) -> tuple[Listing, dict[str, Path], list[str]]:
    """The listing of a folder, and the files to copy. None is missing."""
    found = list_files(place, _skipped).without(folder)
    return found, {path: place / path for path in _pick(found.sizes, module_folders(place))}, []


def _download(source: Source, folder: Path) -> tuple[Listing, dict[str, Path], list[str]]:
    """The listing of a Hub model at its commit, the files to copy, and those that could not be downloaded.

    If the Hub does not answer, the cached files are all that is known.
    """
    name, commit = source.name, source.commit
    snapshot = Path(str(cached_file(name, CONFIG_NAME, revision=commit))).parent
    try:
        tree = list(HfApi().list_repo_tree(name, recursive=True, revision=commit))
    except (HTTPError, OSError) as error:
        why = "offline" if constants.HF_HUB_OFFLINE else explain(error)
        logger.warning(f"note: the Hub does not list the files of {name} ({why}): only cached files are carried over")
        return _cached(snapshot, folder)
    sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile) and ".." not in entry.path}
    found = Listing(sizes, {}).without(folder)
    files, missing = {}, []

    def download(paths: Iterable[str]) -> None:
        for path in paths:
            try:
                files[path] = Path(hf_hub_download(name, path, revision=commit))
            except (HTTPError, OSError):
                missing.append(path)

    download(path for path in found.sizes if path == MODULES or path.rpartition("/")[2] == ROUTER)
    wanted = _pick(found.sizes, module_folders(snapshot))
    download(path for path in wanted if path not in {*files, *missing})
    return found, files, missing
