"""Compare an ONNX graph in onnxruntime with the model in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..conversion.inputs import unmasked
from ..errors import OutputError
from ..files import explain
from .signature import Exportable, Signature

TOLERANCE = 1e-4
CASES = ((1, 1, 0), (1, 9, 0), (3, 40, 4))  # batch, length, padded tokens: none as traced
STEPS = 4


def check_graph(file: Path, model: PreTrainedModel, signature: Signature) -> float:
    """The largest difference between the outputs of the graph and of the model, relative to the largest output.

    Batches of several sizes and lengths are compared, one with padding. With a cache, each is run at once and as a
    prefill followed by single tokens, and compared with one pass of the model without a cache.

    Raises:
        OutputError: it is above ``TOLERANCE``, or onnxruntime does not run the graph, or the model fails.
    """
    import onnxruntime

    reference = Exportable(model, signature.outputs)
    differences = []
    try:
        with torch.no_grad():
            cases = [(sample, reference(sample)) for sample in (signature.sample(*case) for case in CASES)]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for sample, expected in cases:
            length = next(iter(sample.values())).shape[1]
            splits = [[length]]
            if signature.cached and length > STEPS:
                splits.append([length - STEPS] + [1] * STEPS)
            for split in splits:
                pairs = zip(_run(session, sample, signature, split), expected, strict=True)
                differences += [_difference(*pair, sample.get("attention_mask")) for pair in pairs]
    except Exception as error:  # the errors of onnxruntime have no common class; the model may fail on a longer text
        raise OutputError(f"the graph of {type(model).__name__} cannot be checked: {explain(error)}") from error
    worst = float(np.max(differences))  # unlike max, NaN if one of them is
    if not worst <= TOLERANCE:
        raise OutputError(
            f"the graph of {type(model).__name__} does not compute the same: its outputs differ from those of the "
            f"model by {worst:.1e} of the largest one, more than {TOLERANCE:.0e}; nothing was written"
        )
    return worst


def _run(session: Any, sample: dict[str, Tensor], signature: Signature, split: Sequence[int]) -> list[np.ndarray]:
    """The outputs of the graph for ``sample``, fed in parts of the lengths in ``split``."""
    feed = {name: value.numpy() for name, value in sample.items()}
    if not signature.cached:
        return session.run(signature.outputs, feed)
    shapes = {each.name: each.shape for each in session.get_inputs()}
    batch, names = len(feed["input_ids"]), signature.cache_names
    past = {name: np.zeros((batch, shapes[name][1], 0, shapes[name][3]), np.float32) for name, _ in names}
    parts, start = [], 0
    for length in split:
        part = {name: value[:, start : start + length] for name, value in feed.items()}
        part["attention_mask"] = feed["attention_mask"][:, : start + length]
        found = session.run([*signature.outputs, *(name for _, name in names)], part | past)
        parts.append(found[: len(signature.outputs)])
        past = {name: value for (name, _), value in zip(names, found[len(signature.outputs) :], strict=True)}
        start += length
    return [np.concatenate(pieces, axis=1) for pieces in zip(*parts, strict=True)]


def _difference(actual: np.ndarray, expected: Tensor, mask: Tensor | None) -> float:
    if actual.shape != tuple(expected.shape):
        return float("inf")
    wanted = unmasked(expected, mask)
    largest = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)  # all outputs of a new head may be 0
    return float((unmasked(torch.from_numpy(actual), mask) - wanted).abs().max() / largest)
