"""Run a model over calibration batches: histograms of pre-activations, mean loss, sample outputs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from ..checkpoints.verify import evaluating
from ..errors import CalibrationError
from ..files import explain
from ..fitting.histogram import Histogram
from ..processes import collective_device, several_processes, sum_over_processes
from .sites import Site


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Results of the source model on the calibration batches, for comparison with the converted model.

    Attributes:
        batches: the calibration batches, or None.
        histograms: the pre-activations of each module that was used, by path.
        loss: the mean loss, None without labels.
        first: the first batch; empty in a process without batches.
        reference: the output on the first samples in float32.
        noise_floor: relative error of the same output in the model's dtype; None for float32, or a quantized model.
    """

    batches: Iterable | None = None
    histograms: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    loss: float | None = None
    first: tuple = ()
    reference: Tensor | None = None
    noise_floor: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, sites: Iterable[Site], batches: Iterable | None) -> Calibration:
        """Run ``model`` over ``batches``; raises as ``collect``."""
        if batches is None:
            return cls()
        rest = iter(batches)
        first = tuple(itertools.islice(rest, 1))
        histograms, loss = collect_sites(model, sites, itertools.chain(first, rest))
        reference, noise_floor = _reference(model, first[0]) if first else (None, None)
        return cls(batches, histograms, loss, first, reference, noise_floor)

    def output_error(self, model: PreTrainedModel) -> float | None:
        """Relative error of the output of ``model`` on the first samples."""
        if self.reference is None:
            return None
        with torch.no_grad():
            return _relative(main_output(model, self.first[0], sample=True), self.reference)

    def loss_of(self, model: PreTrainedModel) -> float | None:
        """The mean loss of ``model``; None without labels, or if the batches can be read only once."""
        if self.batches is None or self.loss is None or not readable_again(self.batches):
            return None
        return mean_loss(model, (batch for batch in self.batches if has_labels(model, batch)))


def _reference(model: PreTrainedModel, batch) -> tuple[Tensor, float | None]:
    """The output of the source model in float32. For a lower precision, also the model's error relative to it."""
    with torch.no_grad():
        output = main_output(model, batch, sample=True)
    if torch.finfo(model.dtype).bits >= 32 or getattr(model, "hf_quantizer", None) is not None:
        return output, None
    try:
        with torch.no_grad():
            exact = main_output(copy.deepcopy(model).float(), batch, sample=True)
    except torch.OutOfMemoryError:
        return output, None
    return exact, _relative(output, exact)


def _relative(actual: Tensor, expected: Tensor) -> float | None:
    """|actual - expected| / |expected|, in the Euclidean norm over all elements; None if not finite."""
    ratio = torch.linalg.vector_norm((actual - expected).double()) / torch.linalg.vector_norm(expected.double())
    return float(ratio) if torch.isfinite(ratio) else None


def collect(
    model: PreTrainedModel, modules: Iterable[str], batches: Iterable
) -> tuple[dict[str, Histogram], float | None]:
    """Run ``model`` over ``batches``. Returns histograms of the inputs of ``modules`` by path (without modules that had
    no input), and the mean loss, None without labels.

    Under ``torch.distributed`` each process passes its own batches and gets the sums over all processes.

    Raises:
        CalibrationError: there are no batches, the model rejects a batch, or pre-activations are not finite.

    Example:
        >>> from hf_ortho.conversion import collect
        >>> histograms, loss = collect(model, ["transformer.h.0.mlp.act"], [{"input_ids": torch.arange(8)[None]}])
        >>> int(histograms["transformer.h.0.mlp.act"].counts.sum()) == 8 * 4 * 16, loss
        (True, None)
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
    for name, histogram in histograms.items():
        if several_processes():
            histogram.reduce(collective_device(model.device))
        histogram.check(name)
    return {name: histogram for name, histogram in histograms.items() if histogram.counts.any()}, loss


def collect_sites(
    model: PreTrainedModel, sites: Iterable[Site], batches: Iterable
) -> tuple[dict[str, Histogram], float | None]:
    """``collect`` for the modules of ``sites``; tied modules have one histogram of the inputs of all of them."""
    tied = {path: source for site in sites for path, source in site.tied}
    histograms, loss = collect(model, [path for site in sites for path in site.modules], batches)
    for path, source in tied.items():
        if path in histograms:
            histograms.setdefault(source, Histogram()).add(histograms[path])
    return histograms | {path: histograms[source] for path, source in tied.items() if source in histograms}, loss


def _unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x``, (batch, length, ...), where a (batch, length) mask is not 0; all of ``x`` if the shapes do not match."""
    return x[mask.bool()] if mask is not None and mask.ndim == 2 and x.shape[:2] == mask.shape else x


def has_labels(model: PreTrainedModel, batch) -> bool:
    """Whether ``model`` returns a loss for ``batch``."""
    return isinstance(batch, Mapping) and any(key in batch for key in find_labels(type(model)))


def readable_again(batches: Iterable) -> bool:
    """Whether ``batches`` can be iterated more than once, like a list and unlike a generator."""
    return iter(batches) is not batches


def check_batches(batches: Iterable) -> None:
    """Raise CalibrationError unless ``batches`` is an iterable of batches."""
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration is {type(batches).__name__}: pass an iterable of model inputs, for example a list of "
            "{'input_ids': tensor} mappings or a DataLoader"
        )


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Iterable) -> float | None:
    """Mean loss over ``batches`` in evaluation mode, weighted by the number of labels; None without labels.

    Modes and config of the model do not change.
    """
    check_batches(batches)
    total = weight = 0.0
    count = 0
    with evaluating(model):
        for count, batch in enumerate(batches, 1):
            loss, labels = _loss(model, batch, f"calibration batch {count}")
            if labels:
                total, weight = total + loss * labels, weight + labels
    sums = torch.tensor([total, weight, count], dtype=torch.float64, device=collective_device(model.device))
    total, weight, count = sum_over_processes(sums).tolist()
    if not count:
        raise CalibrationError("calibration is empty: pass at least one batch of model inputs")
    return total / weight if weight else None


def main_output(model: PreTrainedModel, batch, *, sample: bool) -> Tensor:
    """The logits, or the first floating output, in float32; with ``sample``, of 4 samples and their last 64 tokens."""
    inputs = _inputs(batch, "a calibration batch", model)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs = {k: v for k, v in inputs.items() if k not in find_labels(type(model))}
        inputs["logits_to_keep"] = 64 if sample else 0
    tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
    if sample and all(v.ndim and len(v) == len(tensors[0]) for v in tensors):
        inputs = {k: v[:4] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with evaluating(model):
        outputs = _forward(model, inputs, "a calibration batch")
    values = [outputs.get("logits"), *outputs.values()] if isinstance(outputs, Mapping) else list(outputs)
    output = next(v.float() for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim)
    return _unmasked(output, None if model.config.is_encoder_decoder else inputs.get("attention_mask"))


def _loss(model: PreTrainedModel, batch, where: str) -> tuple[float, int]:
    """The loss of one batch and its number of labels, 0 without a loss."""
    accepted = inspect.signature(model.forward).parameters
    inputs = _inputs(batch, where, model)
    labeled = has_labels(model, batch)
    if not labeled and "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1  # the logits of a language model dwarf its activations
    loss = getattr(_forward(model, inputs, where), "loss", None)
    if loss is None or not labeled:
        return 0.0, 0
    labels = inputs.get("labels")
    if labels is None:
        return float(loss), len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    if model.can_generate() and not model.config.is_encoder_decoder:
        labels = labels[:, 1:]  # each token is predicted from the previous ones, so the first one does not count
    return float(loss), int((labels != -100).sum())


def _forward(model: PreTrainedModel, inputs: dict, where: str):
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    try:
        with _uncompiled():
            return model(**inputs)
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError) as error:
        raise CalibrationError(f"{where}: {type(model).__name__} fails on it: {explain(error)}") from error


def _uncompiled():
    """Compiled code may ignore new hooks."""
    compiling = "torch._dynamo" in sys.modules  # otherwise nothing is compiled, and this would import it
    return torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext()


def _inputs(batch, where: str, model: PreTrainedModel) -> dict:
    if isinstance(batch, Tensor):
        batch = {model.main_input_name: batch}
    if not isinstance(batch, Mapping) or not batch:
        raise CalibrationError(
            f"{where} is {type(batch).__name__}: pass a mapping of model inputs or a tensor of {model.main_input_name}"
        )
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise CalibrationError(f"{where}: {key} contains NaN or infinity")

    def place(value):
        if not isinstance(value, Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)

    return {key: place(value) for key, value in batch.items()}
