"""Check that a saved model reloads to the same tensors and outputs."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import OutputError
from .custom_code import loader


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Small seeded inputs that the model accepts; None if no known kind of input works."""
    made = {"input_ids": _token_ids(model.config), "pixel_values": _pixels(model.config)}
    accepted = inspect.signature(model.forward).parameters
    known = {name: value for name, value in made.items() if value is not None and name in accepted}
    main = model.main_input_name
    for names in (known, [main], [name for name in known if name != main]):
        inputs = {name: known[name] for name in names if name in known}
        if inputs:
            with contextlib.suppress(Exception):  # the model may need other inputs
                outputs(model, inputs)
                return inputs
    return None


def _token_ids(config: PreTrainedConfig) -> Tensor | None:
    text = config.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        return None
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    return torch.randint(0, text.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _pixels(config: PreTrainedConfig) -> Tensor | None:
    vision = getattr(config, "vision_config", config)
    if not isinstance(getattr(vision, "num_channels", None), int):
        return None
    size = getattr(vision, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(1, vision.num_channels, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Tensor] | None) -> list[Tensor]:
    """All tensors that the model returns for ``inputs`` in evaluation mode, on the CPU; empty if ``inputs`` is None."""
    if inputs is None:
        return []
    inputs = {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with evaluating(model), _aligned(model):
        values = model(**inputs).to_tuple()
    return [v.cpu() for v in values if isinstance(v, Tensor)]


@contextlib.contextmanager
def evaluating(model: PreTrainedModel):
    """Put the model in evaluation mode; afterwards restore modes and config."""
    modes = [(module, module.training) for module in model.modules()]
    settings = dict(vars(model.config))  # a classifier stores its problem_type there when it first sees labels
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        vars(model.config).clear()
        vars(model.config).update(settings)


@contextlib.contextmanager
def _aligned(model: PreTrainedModel) -> Iterator[None]:
    """Run each module with aligned copies of its tensors, one module at a time.

    safetensors maps tensors at any offset in a file, and a product with unaligned memory may round differently.
    """
    mapped: dict[int, Tensor] = {}

    def tensors_of(module):
        return (*module.parameters(recurse=False), *module.buffers(recurse=False))

    def copy(module, args):
        for tensor in tensors_of(module):
            mapped[id(tensor)], tensor.data = tensor.data, tensor.data.clone()

    def restore(module, args, output):
        for tensor in tensors_of(module):
            tensor.data = mapped.pop(id(tensor))

    handles = [module.register_forward_pre_hook(copy) for module in model.modules()]
    handles += [module.register_forward_hook(restore) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """A digest of every tensor of the state dict, to compare two models without holding both in memory."""

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

    Returns whether the outputs are bit-equal too. BLAS does not guarantee it: tensors mapped from a file may have
    another alignment than tensors in memory.

    Raises:
        OutputError: a tensor or an output differs.
    """
    cls, options = loader(model_class)
    reloaded = cls.from_pretrained(folder, dtype="auto", **options)
    actual = outputs(reloaded, inputs)
    close = len(actual) == len(expected) and all(
        torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1), equal_nan=True)
        for a, b in zip(actual, expected, strict=True)
    )
    if fingerprint(reloaded) != tensors or not close:
        raise OutputError(f"the model saved in {folder} does not reload to the same tensors and outputs")
    return all(map(torch.equal, actual, expected))
