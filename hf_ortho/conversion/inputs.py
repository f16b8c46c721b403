"""Forward passes over calibration batches, and the predictions of a model on them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import find_labels

from ..errors import CalibrationError, WidthError
from ..files import explain

CAUSAL_LMS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model predicts for one batch.

    Attributes:
        output: logits, classes last, or the first floating output, in the dtype of the model.
        kind: ``categorical`` (logits of one class per prediction), ``binary`` (of independent classes), or ``real``.
        mask: (batch, length), True where ``output`` counts; None if all of it does.
        loss: the mean loss of the model, None without labels.
        labels: number of labels in the loss.
    """

    output: Tensor
    kind: str
    mask: Tensor | None
    loss: Tensor | None = None
    labels: int = 0

    def rows(self) -> Tensor:
        """The output that counts, shape (predictions, classes or features)."""
        y = unmasked(self.output, self.mask)
        return y.reshape(-1, y.shape[-1])


def run(model: PreTrainedModel, batch, where: str = "a calibration batch") -> None:
    """Run ``model`` on ``batch`` for its hooks only, and with as few logits as possible; raises as ``predict``."""
    inputs = model_inputs(batch, where, model)
    if "logits_to_keep" in inspect.signature(model.forward).parameters and not model.config.is_encoder_decoder:
        inputs = {key: value for key, value in inputs.items() if key not in find_labels(type(model))}
        inputs["logits_to_keep"] = 1  # the logits of a language model dwarf its activations
    forward(model, inputs, where)


def predict(model: PreTrainedModel, batch, where: str = "a calibration batch", *, loss: bool = False) -> Prediction:
    """Run ``model`` on ``batch``.

    Args:
        where: what an error calls the batch.
        loss: whether to compute the loss, from the labels in ``batch``. The labels of a causal language model are its
            own inputs.

    Raises:
        CalibrationError: ``batch`` is no batch of inputs for ``model``.
    """
    inputs = model_inputs(batch, where, model)
    labels = [key for key in find_labels(type(model)) if not key.startswith("input_")]
    mask = inputs.get("attention_mask")
    if model.config.is_encoder_decoder:
        target = inputs.get("labels")
        mask = target != -100 if isinstance(target, Tensor) else inputs.get("decoder_attention_mask")
    if not loss and not model.config.is_encoder_decoder:  # an encoder-decoder derives its decoder's inputs from labels
        inputs = {key: value for key, value in inputs.items() if key not in labels}
    ids = inputs.get("input_ids")
    if (
        loss
        and type(model).__name__ in CAUSAL_LMS
        and "labels" in labels
        and "labels" not in inputs
        and ids is not None
    ):
        shifted = ids if mask is None else ids.masked_fill(mask == 0, -100)  # by the model
        try:
            outputs = forward(model, labeled := inputs | {"labels": shifted}, where)
            inputs = labeled
        except CalibrationError:  # for example, a new head of other classes
            outputs = forward(model, inputs, where)
    else:
        outputs = forward(model, inputs, where)
    values = [outputs.get("logits"), *outputs.values()] if isinstance(outputs, Mapping) else list(outputs)
    floating = (v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim)
    output = next(floating, None)
    if output is None:
        raise CalibrationError(f"{where}: {type(model).__name__} returns no floating-point tensor to compare")
    output, kind = _classes_last(model, output, isinstance(outputs, Mapping) and outputs.get("logits") is output)
    mask = mask.bool() if mask is not None and fits_mask(output, mask) else None
    value = outputs.get("loss") if isinstance(outputs, Mapping) else None
    count = _label_count(model, inputs) if loss and value is not None and any(key in inputs for key in labels) else 0
    return Prediction(output, kind, mask, value if count else None, count)


def _classes_last(model: PreTrainedModel, output: Tensor, logits: bool) -> tuple[Tensor, str]:
    """``output`` with its classes in the last dimension, and its kind."""
    config = model.config
    labels = config.num_labels or 0
    sizes = {labels, labels + 1}  # an object detector has one more, "no object"
    sizes |= {getattr(c, "vocab_size", labels) for c in (config, config.get_text_config())}
    if logits and output.ndim == 4 and output.shape[1] in sizes:  # semantic segmentation
        output = output.movedim(1, -1)
    if (
        not logits
        or output.ndim < 2
        or output.shape[-1] < 2
        or output.shape[-1] not in sizes
        or config.problem_type == "regression"
    ):
        return output, "real"
    return output, "binary" if config.problem_type == "multi_label_classification" else "categorical"


def _label_count(model: PreTrainedModel, inputs: dict) -> int:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):  # under another name, or one mapping per image
        return len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    if type(model).__name__ in CAUSAL_LMS:
        labels = labels[:, 1:]  # each token is predicted from the previous ones, so the first one does not count
    return int((labels != -100).sum())


def unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x``, (batch, length, ...), where a (batch, length) mask is not 0; all of ``x`` if the shapes do not match."""
    return x[mask.bool()] if mask is not None and fits_mask(x, mask) else x


def fits_mask(x: Tensor, mask: Tensor) -> bool:
    """Whether ``x`` is (batch, length, ...) for a (batch, length) mask."""
    return mask.ndim == 2 and x.ndim > 2 and x.shape[:2] == mask.shape


def has_gradients(model: PreTrainedModel) -> bool:
    """Whether autograd can use the weights: not if they were loaded under ``torch.inference_mode``."""
    return not any(p.is_inference() for p in model.parameters())


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


def forward(model: PreTrainedModel, inputs: dict, where: str):
    """Call ``model``, without a cache; a failure is a CalibrationError."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    try:
        with _uncompiled():
            return model(**inputs)
    except (torch.OutOfMemoryError, WidthError):  # not the fault of the batch
        raise
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError) as error:
        raise CalibrationError(f"{where}: {type(model).__name__} fails on it: {explain(error)}") from error


def _uncompiled():
    """Compiled code may ignore new hooks."""
    compiling = "torch._dynamo" in sys.modules  # otherwise nothing is compiled, and this would import it
    return torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext()


def model_inputs(batch, where: str, model: PreTrainedModel) -> dict:
    """``batch`` as keyword arguments, on the device and in the dtype of ``model``.

    Raises:
        CalibrationError: it is of another kind, or not finite.
    """
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
        if value.is_inference():  # a backward pass could not use it
            value = value.clone()
        return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)

    return {key: place(value) for key, value in batch.items()}
