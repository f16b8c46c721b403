"""Load a checkpoint with its head and its processor; save one so that nothing half-written is left."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..errors import CheckpointError, OutputError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclasses.dataclass
class Checkpoint:
    """A model with what belongs to it.

    Attributes:
        task: ``causal-lm``, ``image-classification``, or empty.
        commit: the resolved 40-hex commit on the Hub, None for a folder.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    image_processor: Any | None
    task: str
    commit: str | None

    @property
    def processor(self):
        return self.tokenizer or self.image_processor


def _explain(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def task_of(architecture: str) -> str:
    """The task behind the name of a model class."""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    return "image-classification" if architecture.endswith("ForImageClassification") else ""


def load_checkpoint(name: str, *, revision: str | None = None, dtype: str = "auto", **overrides) -> Checkpoint:
    """Load a folder or a Hub model in the class that its config names, so that heads are kept.

    Args:
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
        overrides: passed to the config, for example ``num_labels``.

    Raises:
        CheckpointError: there is no checkpoint, or no transformers class for it.
    """
    _check_place(name)
    try:
        commit = _commit(name, revision)
        revision = commit or revision  # a branch may move between two downloads
        config = AutoConfig.from_pretrained(name, revision=revision)
        architecture = (config.architectures or [""])[0]
        cls = getattr(transformers, architecture, None)
        if cls is None:
            raise CheckpointError(
                f"the config of {name} names the class {architecture or 'none'!r} under architectures, which "
                f"transformers {transformers.__version__} does not have"
            )
        model = cls.from_pretrained(name, revision=revision, dtype=dtype, **overrides)
        tokenizer = _processor(AutoTokenizer, TOKENIZER_FILES, name, revision)
        images = _processor(AutoImageProcessor, IMAGE_FILES, name, revision)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {_explain(error)}") from error
    model.eval()
    model.config._commit_hash = commit  # for the provenance; transformers does not keep it, nor write it
    return Checkpoint(model, tokenizer, images, task_of(architecture), commit)


def _check_place(name: str) -> None:
    path = Path(name)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise CheckpointError(f"{name} is no checkpoint: a folder with config.json and safetensors weights is expected")
    if not path.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise CheckpointError(f"{name} does not exist")


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a Hub model, from the place of its config in the cache."""
    file = Path(str(cached_file(name, "config.json", revision=revision)))
    return file.parent.name if file.parent.parent.name == "snapshots" else None


def _processor(auto, files: tuple[str, ...], name: str, revision: str | None):
    """The tokenizer or image processor, None if the checkpoint comes without one."""
    present = (cached_file(name, f, revision=revision, _raise_exceptions_for_missing_entries=False) for f in files)
    if not any(present):
        return None
    try:
        return auto.from_pretrained(name, revision=revision)
    except ImportError as error:
        raise CheckpointError(f"the processor of {name} needs a package: {_explain(error)}") from error
    except (OSError, ValueError):
        if auto is AutoTokenizer:
            raise
        return None  # the file describes another kind, such as an audio feature extractor


def check_output(folder: str | os.PathLike, overwrite: bool) -> Path:
    """The folder to write, before any work is done.

    Raises:
        OutputError: it is a file, or holds something and ``overwrite`` is not set, or its parent cannot be written.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {path} exists and is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"output folder {path} exists and is not empty; pass --overwrite or name another")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"output folder {path}: {parent} cannot be written")
    return path


@contextlib.contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place if the block ends well, and vanishes if not.

    Raises:
        OutputError: writing failed, for example on a full disk; ``folder`` is as before.
    """
    target = Path(folder).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {_explain(error)}") from error
    old = draft.with_name(f"{draft.name}.old")
    try:
        draft.chmod(0o777 & ~_umask())
        yield draft
        if target.exists():
            os.rename(target, old)
        os.rename(draft, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder} cannot be written, nothing was changed: {_explain(error)}") from error
    finally:
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the model, its config and its processors into ``folder``, which exists."""
    checkpoint.model.save_pretrained(folder)
    for processor in (checkpoint.tokenizer, checkpoint.image_processor):
        if processor is not None:
            processor.save_pretrained(folder)


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """A small seeded input of the model's main kind, None if the kind is unknown."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    if model.main_input_name == "input_ids":
        ids = torch.randint(0, config.vocab_size, (1, min(16, _positions(config))), generator=generator)
        return {"input_ids": ids}
    if model.main_input_name == "pixel_values" and isinstance(getattr(model.config, "num_channels", None), int):
        size = getattr(model.config, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, model.config.num_channels, height, width, generator=generator)}
    return None


def _positions(config: PreTrainedConfig) -> int:
    return getattr(config, "max_position_embeddings", None) or 16


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Tensor] | None) -> list[Tensor]:
    """All tensors that the model returns for ``inputs`` in evaluation mode, on the CPU; none without inputs."""
    if inputs is None:
        return []
    mode = model.training
    model.eval()
    inputs = {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with _aligned(model):
        values = model(**inputs).to_tuple()
    model.train(mode)
    return [v.cpu() for v in values if isinstance(v, Tensor)]


@contextlib.contextmanager
def _aligned(model: PreTrainedModel) -> Iterator[None]:
    """Give each module a copy of its own tensors while it runs, one module at a time.

    safetensors maps tensors at any offset in a file, and a product with unaligned memory may round differently.
    """
    mapped: dict[int, Tensor] = {}

    def own(module):
        return (*module.parameters(recurse=False), *module.buffers(recurse=False))

    def copy(module, args):
        for tensor in own(module):
            mapped[id(tensor)], tensor.data = tensor.data, tensor.data.clone()

    def restore(module, args, output):
        for tensor in own(module):
            tensor.data = mapped.pop(id(tensor))

    handles = [module.register_forward_pre_hook(copy) for module in model.modules()]
    handles += [module.register_forward_hook(restore) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """A digest of every tensor of the state dict, so that two models can be compared one after the other in memory."""

    def digest(tensor: Tensor) -> str:
        raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.blake2b(raw).hexdigest()}"

    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def verify_reload(
    model_class: Any,
    folder: Path,
    tensors: dict[str, str],
    inputs: dict[str, Tensor] | None,
    expected: list[Tensor],
) -> bool:
    """Load ``folder`` with plain ``from_pretrained``: all tensors must be bit-equal, and the outputs close.

    Returns whether the outputs are bit-equal too, which BLAS does not promise: tensors mapped from a file may be
    aligned otherwise than those in memory.

    Raises:
        OutputError: a tensor or an output differs.
    """
    reloaded = model_class.from_pretrained(folder, dtype="auto")
    found = outputs(reloaded, inputs)
    close = len(found) == len(expected) and all(
        torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1), equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    )
    if fingerprint(reloaded) != tensors or not close:
        raise OutputError(f"the model saved in {folder} does not reload to the same tensors and outputs")
    return all(map(torch.equal, found, expected))
