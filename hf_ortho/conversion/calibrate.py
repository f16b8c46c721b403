"""Run a model over calibration batches: histograms of pre-activations, weighted by their effect on the predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.verify import evaluating
from ..errors import CalibrationError, WidthError
from ..files import explain
from ..fitting.histogram import Histogram
from ..fitting.options import WEIGHTS
from ..processes import any_process, collective_device, several_processes, sum_over_processes, together
from .fisher import direction, inputs_only, predictions_and_norm, recomputing, watched
from .inputs import Prediction, check_batches, has_gradients, predict, run, unmasked
from .sites import Site

EVERY, MOST = 4, 4  # one of EVERY batches is held out, MOST in all


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration data of a conversion.

    Attributes:
        histograms: the pre-activations of each module that was used, by path; empty without data.
        weights: ``fisher``, ``density``, or None without data.
        batches: batches for comparing the converted model with its source, by name.
        held_out: whether no histogram contains these batches.
        note: why the weights are not those that were asked for; may be empty.
    """

    histograms: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    weights: str | None = None
    batches: dict[str, Any] = dataclasses.field(default_factory=dict)
    held_out: bool = False
    note: str = ""

    @classmethod
    def of(
        cls, model: PreTrainedModel, sites: Iterable[Site], batches: Iterable | None, weights: str, groups: int = 1
    ) -> Calibration:
        """Run ``model`` over ``batches``, except for the second of every four, which is held out; raises as
        ``collect``. Tied modules have one histogram of the inputs of all of them."""
        if batches is None:
            return cls()
        check_batches(batches)
        held_out: dict[str, Any] = {}
        first: dict[str, Any] = {}

        def fitted() -> Iterator[tuple[str, Any]]:
            for i, (where, batch) in enumerate(_named(batches)):
                if is_held_out(i):
                    held_out[where] = batch
                    first.clear()
                else:
                    if not i:
                        first[where] = batch
                    yield where, batch

        sites = list(sites)
        histograms, note = _collect(model, [p for site in sites for p in site.modules], fitted(), weights, groups)
        tied = {path: source for site in sites for path, source in site.tied}
        for path, source in tied.items():
            if path in histograms:
                histograms.setdefault(source, Histogram(groups)).add(histograms[path])
        histograms |= {path: histograms[source] for path, source in tied.items() if source in histograms}
        alone = any_process(torch.tensor(not held_out, device=collective_device(torch.device("cpu"))))
        used = "density" if note else weights
        if used == "fisher" and (missing := sum(h.importance is None for h in histograms.values())):
            note = f"{missing} activations have density weights, since their gradients are zero or not finite"
        return cls(histograms, used, held_out or first, not alone, note)


def is_held_out(i: int) -> bool:
    """Whether the batch of index ``i`` is held out of the fits."""
    return i % EVERY == 1 and i < EVERY * MOST


@torch.inference_mode(False)
def collect(
    model: PreTrainedModel,
    modules: Iterable[str],
    batches: Iterable,
    *,
    weights: str = "fisher",
    groups: int = 1,
    distributed: bool = True,
) -> dict[str, Histogram]:
    """Run ``model`` over ``batches``, and return the histograms of the inputs of ``modules``, by path, without modules
    that had no input.

    Args:
        weights: ``"fisher"`` to give each bin an importance, the sum over its inputs of the second derivative of the
            divergence of the model's predictions by an error of the activation there; ``"density"`` for only counts. If
            the model has no backward pass, its histograms have only counts.
        groups: the number of groups of channels that each histogram tells apart.
        distributed: under ``torch.distributed`` each process passes its own batches and gets the sums over all
            processes. False runs in this process alone.

    Raises:
        WidthError: the inputs of a module cannot be divided into ``groups``.
        CalibrationError: there are no batches, the model rejects a batch, or pre-activations are not finite.
        ProcessError: another process does not call this too.
        torch.OutOfMemoryError: a batch does not fit in the memory of the GPU.

    Example:
        >>> from hf_ortho.conversion import collect
        >>> histograms = collect(model, ["transformer.h.0.mlp.act"], [{"input_ids": torch.arange(8)[None]}])
        >>> int(histograms["transformer.h.0.mlp.act"].counts.sum()) == 8 * 4 * 16
        True
    """
    check_batches(batches)
    with together(distributed, "hf_ortho.conversion.collect"):
        return _collect(model, modules, _named(batches), weights, groups)[0]


def _named(batches: Iterable) -> Iterator[tuple[str, Any]]:
    """What errors call each batch, and the batch."""
    return ((f"calibration batch {i}", batch) for i, batch in enumerate(batches, 1))


def _collect(
    model: PreTrainedModel, paths: Iterable[str], batches: Iterable[tuple[str, Any]], weights: str, groups: int
) -> tuple[dict[str, Histogram], str]:
    """``collect``; also the reason for missing Fisher weights, or an empty string."""
    check_weights(weights)
    histograms = {path: Histogram(groups) for path in paths}
    sums = _Run(model, histograms)
    if weights == "fisher" and not has_gradients(model):
        sums.failure = f"no Fisher weights, since {type(model).__name__} was loaded under torch.inference_mode"
    with evaluating(model):
        for where, batch in batches:
            sums.add(batch, where, fisher=weights == "fisher")
    device = collective_device(torch.device("cpu"))
    count, predictions, norm = sum_over_processes(
        torch.tensor([sums.batches, sums.predictions, sums.norm], dtype=torch.float64, device=device)
    ).tolist()
    if not count:
        raise CalibrationError("calibration is empty: pass at least one batch of model inputs")
    failed, real = any_process(torch.tensor([bool(sums.failure), sums.real], device=device)).tolist()
    total = norm if real else predictions
    for path, histogram in histograms.items():
        if several_processes():
            histogram.reduce(collective_device(model.device))
        histogram.check(path)
        histogram.scale(0.0 if failed or not total else 1 / total)
    note = sums.failure or "no Fisher weights, since the backward pass fails in another process" if failed else ""
    return {path: histogram for path, histogram in histograms.items() if histogram.counts.any()}, note


def check_weights(weights: str) -> None:
    """Raise CalibrationError unless ``weights`` is one of ``WEIGHTS``."""
    if weights not in WEIGHTS:
        raise CalibrationError(f"weights {weights!r}: must be {' or '.join(map(repr, WEIGHTS))}")


class _Run:
    """Sums over the batches of one process."""

    def __init__(self, model: PreTrainedModel, histograms: dict[str, Histogram]):
        self.model, self.histograms = model, histograms
        self.batches = self.predictions = 0
        self.norm = 0.0
        self.real = False
        self.failure = ""
        self.generator = torch.Generator().manual_seed(0)  # with equal batches, all processes get what one gets

    def add(self, batch, where: str, *, fisher: bool) -> None:
        """One forward pass, and with ``fisher`` one backward pass; only a forward pass from the first failure on."""
        self.batches += 1
        if fisher and not self.failure:
            try:
                self._take(*self._pass(batch, where, fisher=True))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, CalibrationError) as error:
                name = type(self.model).__name__
                self.failure = f"no Fisher weights, since the backward pass of {name} fails: {explain(error)}"
            else:
                return
        self._take(*self._pass(batch, where, fisher=False))

    def _take(self, seen: dict[str, Histogram], prediction: Prediction | None) -> None:
        for path, histogram in seen.items():
            self.histograms[path].add(histogram)
        if prediction is not None:
            predictions, norm = predictions_and_norm(prediction)
            self.real = self.real or prediction.kind == "real"
            self.predictions += predictions
            self.norm += norm

    def _pass(self, batch, where: str, *, fisher: bool) -> tuple[dict[str, Histogram], Prediction | None]:
        """The histograms of one batch, and with ``fisher`` the prediction."""
        mask: Tensor | None = None
        counting = True

        def note_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal mask
            mask = None if self.model.config.is_encoder_decoder else kwargs.get("attention_mask")

        def count(module: nn.Module, args: tuple, path: str, histogram: Histogram) -> None:
            if counting:  # not in a backward pass that computes the activations again
                try:
                    histogram.update(unmasked(args[0], mask))
                except WidthError as error:
                    raise WidthError(f"{path}: {error}") from None

        def weigh(x: Tensor, gradient: Tensor, histogram: Histogram) -> None:
            histogram.weigh(unmasked(x, mask), unmasked(gradient, mask))

        seen = {path: Histogram(total.groups) for path, total in self.histograms.items()}
        modules = {path: self.model.get_submodule(path) for path in seen}
        with contextlib.ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(note_mask, with_kwargs=True).remove)
            for path, module in modules.items():
                hook = functools.partial(count, path=path, histogram=seen[path])
                stack.callback(module.register_forward_pre_hook(hook).remove)
            if not fisher:
                stack.enter_context(torch.no_grad())
                run(self.model, batch, where)
                return seen, None
            stack.enter_context(torch.enable_grad())
            stack.enter_context(inputs_only(self.model))
            stack.enter_context(recomputing(self.model))
            stack.enter_context(
                watched((module, functools.partial(weigh, histogram=seen[path])) for path, module in modules.items())
            )
            prediction = predict(self.model, batch, where)
            counting = False
            u = direction(prediction, self.generator)
            prediction.output.backward(u.to(prediction.output.dtype))
        return seen, prediction
