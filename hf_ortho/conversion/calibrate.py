"""Pre-activation statistics: one streamed histogram per activation, filled in one pass over calibration batches."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from ..activations.interpolation import Nodes, Source
from ..errors import CalibrationError
from .checkpoint import task_of

BINS = 1024
REACH = math.asinh(2.0**16)


class Histogram:
    """Counts of x in 1024 bins that are uniform in asinh(x): 0.023 wide around 0, 2.3 % of |x| in the tails.

    Constant memory, on the device of the data. ``minimum`` and ``maximum`` are exact.
    """

    def __init__(self):
        self._counts: Tensor | None = None
        self._extremes: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add all elements of ``x``, any shape and floating dtype."""
        x = x.detach().reshape(-1).float()
        if not x.numel():
            return
        extremes = torch.stack(torch.aminmax(x))
        counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
        for piece in x.split(2**24):  # histc counts in float32
            counts += torch.histc(torch.asinh(piece).clamp_(-REACH, REACH), BINS, -REACH, REACH)
        if self._counts is None or self._extremes is None:
            self._counts, self._extremes = counts, extremes
        else:
            self._counts += counts.to(self._counts.device)
            low, high = extremes.to(self._extremes.device)
            # minimum and maximum propagate NaN, which ``check`` looks for
            self._extremes = torch.stack(
                [torch.minimum(self._extremes[0], low), torch.maximum(self._extremes[1], high)]
            )

    def check(self, where: str) -> None:
        """Raise CalibrationError if a NaN or an infinity was seen."""
        if self._extremes is not None and not torch.isfinite(self._extremes).all():
            raise CalibrationError(
                f"the pre-activations of {where} are not finite (min {self.minimum:g}, max {self.maximum:g}): the "
                "calibration data or the weights hold NaN or infinity"
            )

    @property
    def counts(self) -> np.ndarray:
        return np.zeros(BINS) if self._counts is None else self._counts.cpu().numpy()

    @property
    def minimum(self) -> float:
        return math.nan if self._extremes is None else float(self._extremes[0])

    @property
    def maximum(self) -> float:
        return math.nan if self._extremes is None else float(self._extremes[1])

    @property
    def edges(self) -> np.ndarray:
        """The 1025 bin edges, in units of x."""
        return np.sinh(np.linspace(-REACH, REACH, BINS + 1))

    def nodes(self, source: Source) -> Nodes:
        """Bin centres as fit nodes, weighted by the counts."""
        edges = np.linspace(-REACH, REACH, BINS + 1)
        centres = np.clip(np.sinh((edges[1:] + edges[:-1]) / 2), self.minimum, self.maximum)
        return Nodes.of(source, centres, self.counts, self.minimum, self.maximum)


def collect(
    model: PreTrainedModel, modules: Iterable[str], batches: Iterable
) -> tuple[dict[str, Histogram], float | None]:
    """Run ``model`` over ``batches``; histograms of the inputs of ``modules``, and the mean loss if labels came.

    Raises:
        CalibrationError: no batches, a batch that the model does not take, or non-finite pre-activations.
    """
    histograms = {name: Histogram() for name in modules}
    handles = []
    for name, histogram in histograms.items():

        def observe(module: nn.Module, args: tuple, histogram: Histogram = histogram) -> None:
            histogram.update(args[0])

        handles.append(model.get_submodule(name).register_forward_pre_hook(observe))
    try:
        loss = mean_loss(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    for name, histogram in histograms.items():
        histogram.check(name)
    return histograms, loss


def has_labels(model: PreTrainedModel, batch) -> bool:
    """Whether ``model`` returns a loss for ``batch``."""
    return isinstance(batch, Mapping) and any(key in batch for key in find_labels(type(model)))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Iterable) -> float | None:
    """Mean loss over ``batches`` in evaluation mode, weighted by the labels that count; None without labels.

    Modes and config of the model stay as they are.
    """
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration is {type(batches).__name__}: give an iterable of model inputs, for example a list of "
            "{'input_ids': tensor} mappings or a DataLoader"
        )
    total = weight = 0.0
    count = 0
    with _evaluating(model):
        for count, batch in enumerate(batches, 1):
            loss, labels = _loss(model, batch, f"calibration batch {count}")
            if labels:
                total, weight = total + loss * labels, weight + labels
    if not count:
        raise CalibrationError("calibration is empty: give at least one batch of model inputs")
    return total / weight if weight else None


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel):
    modes = [(module, module.training) for module in model.modules()]
    settings = dict(vars(model.config))  # a classifier notes its problem_type there when it first sees labels
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        vars(model.config).clear()
        vars(model.config).update(settings)


def _loss(model: PreTrainedModel, batch, where: str) -> tuple[float, int]:
    """The loss of one batch and how many labels stand behind it, 0 without a loss."""
    accepted = inspect.signature(model.forward).parameters
    inputs = _inputs(batch, where, model)
    labelled = has_labels(model, batch)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if not labelled and "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1  # the logits of a language model dwarf its activations
    try:
        loss = getattr(model(**inputs), "loss", None)
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(f"{where}: {type(model).__name__} fails on it: {reason}") from error
    if loss is None or not labelled:
        return 0.0, 0
    labels = inputs.get("labels")
    if labels is None:
        return float(loss), len(next(iter(inputs.values())))
    if task_of(type(model).__name__) == "causal-lm":
        labels = labels[:, 1:]
    return float(loss), int((labels != -100).sum())


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
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
