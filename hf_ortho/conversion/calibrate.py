"""Run a model over calibration batches: histograms of pre-activations, the mean loss, sample outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from ..checkpoints.load import task_of
from ..checkpoints.verify import evaluating
from ..errors import CalibrationError
from ..fitting.histogram import Histogram


def collect(
    model: PreTrainedModel, modules: Iterable[str], batches: Iterable
) -> tuple[dict[str, Histogram], float | None]:
    """Run ``model`` over ``batches``; histograms of the inputs of ``modules``, and the mean loss if labels came.

    Under ``torch.distributed`` each process gives its own batches and gets the sums over all.

    Raises:
        CalibrationError: no batches, a batch that the model does not take, or non-finite pre-activations.
    """
    histograms = {name: Histogram() for name in modules}
    mask: Tensor | None = None

    def note_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal mask
        mask = None if model.config.is_encoder_decoder else kwargs.get("attention_mask")

    handles = [model.register_forward_pre_hook(note_mask, with_kwargs=True)]
    for name, histogram in histograms.items():

        def observe(module: nn.Module, args: tuple, histogram: Histogram = histogram) -> None:
            histogram.update(_unmasked(args[0], mask))

        handles.append(model.get_submodule(name).register_forward_pre_hook(observe))
    try:
        loss = mean_loss(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    for histogram in histograms.values() if several_processes() else ():
        histogram.reduce(collective_device(model))
    for name, histogram in histograms.items():
        histogram.check(name)
    return histograms, loss


def _unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x``, (batch, length, ...), where a (batch, length) mask is not 0; all of it if the shapes do not tell."""
    return x[mask.bool()] if mask is not None and mask.ndim == 2 and x.shape[:2] == mask.shape else x


def several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def collective_device(model: PreTrainedModel) -> torch.device:
    """Where the tensors of a collective must lie: NCCL takes none from the CPU."""
    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else model.device


def has_labels(model: PreTrainedModel, batch) -> bool:
    """Whether ``model`` returns a loss for ``batch``."""
    return isinstance(batch, Mapping) and any(key in batch for key in find_labels(type(model)))


def check_batches(batches: Iterable) -> None:
    """Raise CalibrationError unless ``batches`` is an iterable of batches."""
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration is {type(batches).__name__}: give an iterable of model inputs, for example a list of "
            "{'input_ids': tensor} mappings or a DataLoader"
        )


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Iterable) -> float | None:
    """Mean loss over ``batches`` in evaluation mode, weighted by the labels that count; None without labels.

    Modes and config of the model stay as they are.
    """
    check_batches(batches)
    total = weight = 0.0
    count = 0
    with evaluating(model):
        for count, batch in enumerate(batches, 1):
            loss, labels = _loss(model, batch, f"calibration batch {count}")
            if labels:
                total, weight = total + loss * labels, weight + labels
    if several_processes():
        sums = torch.tensor([total, weight, count], dtype=torch.float64, device=collective_device(model))
        torch.distributed.all_reduce(sums)
        total, weight, count = sums.tolist()
    if not count:
        raise CalibrationError("calibration is empty: give at least one batch of model inputs")
    return total / weight if weight else None


def main_output(model: PreTrainedModel, batch, *, sample: bool) -> Tensor:
    """The logits, or the first floating output, float32; ``sample``: of 4 samples and their last 64 tokens at most."""
    inputs = _inputs(batch, "a calibration batch", model)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs = {k: v for k, v in inputs.items() if k not in find_labels(type(model))}
        inputs["logits_to_keep"] = 64 if sample else 0
    tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
    if sample and all(v.ndim and len(v) == len(tensors[0]) for v in tensors):
        inputs = {k: v[:4] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with evaluating(model):
        found = _forward(model, inputs, "a calibration batch")
    values = [found.get("logits"), *found.values()] if isinstance(found, Mapping) else list(found)
    output = next(v.float() for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim)
    return _unmasked(output, None if model.config.is_encoder_decoder else inputs.get("attention_mask"))


def _loss(model: PreTrainedModel, batch, where: str) -> tuple[float, int]:
    """The loss of one batch and how many labels stand behind it, 0 without a loss."""
    accepted = inspect.signature(model.forward).parameters
    inputs = _inputs(batch, where, model)
    labelled = has_labels(model, batch)
    if not labelled and "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1  # the logits of a language model dwarf its activations
    loss = getattr(_forward(model, inputs, where), "loss", None)
    if loss is None or not labelled:
        return 0.0, 0
    labels = inputs.get("labels")
    if labels is None:
        return float(loss), len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    if task_of(type(model).__name__) == "causal-lm":
        labels = labels[:, 1:]
    return float(loss), int((labels != -100).sum())


def _forward(model: PreTrainedModel, inputs: dict, where: str):
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    try:
        return model(**inputs)
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(f"{where}: {type(model).__name__} fails on it: {reason}") from error


def _inputs(batch, where: str, model: PreTrainedModel) -> dict:
    if isinstance(batch, Tensor):
        batch = {model.main_input_name: batch}
    if not isinstance(batch, Mapping) or not batch:
        raise CalibrationError(
            f"{where} is {type(batch).__name__}: give a mapping of model inputs or a tensor of {model.main_input_name}"
        )
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise CalibrationError(f"{where}: {key} holds NaN or infinity")

    def place(value):
        if not isinstance(value, Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)

    return {key: place(value) for key, value in batch.items()}
