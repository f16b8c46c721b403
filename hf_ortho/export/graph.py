"""Write a model as an ONNX graph with ``torch.onnx``."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..errors import CheckpointError
from ..files import explain
from ..logs import logging_at
from .signature import Exportable, Signature, cache_of

logger = logging.getLogger("hf_ortho")

SINGLE_FILE = 1.8 * 2**30  # bytes of weights; a protobuf file holds 2 GiB


def write_graph(model: PreTrainedModel, signature: Signature, file: Path) -> int:
    """Write the graph of ``model`` to ``file``, and weights of more than 1.8 GiB to ``file`` with the ending ``_data``.

    Batch size and length are free, also of the past. It has the same length in every layer: with a sliding window, the
    mask leaves out what is too old. The attention is traced in its ``eager`` form: it masks with the lowest finite
    number, so that a row where everything is masked has no NaN, which would spread by 0 * NaN.

    Returns:
        The version of the operators.

    Raises:
        CheckpointError: torch cannot export the model.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    inputs = signature.sample(2, 6)
    kwargs: dict[str, Any] = {"inputs": inputs}
    shapes: dict[str, Any] = {
        "inputs": {
            name: {0: "batch_size"} if signature.image else {0: "batch_size", 1: "sequence_length"} for name in inputs
        }
    }
    names, results = list(inputs), list(signature.outputs)
    if signature.cached:
        with torch.no_grad():
            past = cache_of(model(**signature.sample(2, 5), past_key_values=DynamicCache(), use_cache=True))
        kwargs["past"] = [(key.clone(), value.clone()) for key, value in past]
        inputs["attention_mask"] = torch.ones(2, 5 + 6, dtype=torch.long)
        shapes["inputs"]["attention_mask"] = {0: "batch_size", 1: "total_sequence_length"}
        shapes["past"] = [({0: "batch_size", 2: "past_sequence_length"},) * 2 for _ in past]
        names += [name for name, _ in signature.cache_names]
        results += [name for _, name in signature.cache_names]
    try:
        with _eager_attention(model), _quiet():
            program = torch.onnx.export(
                Exportable(model, signature.outputs),
                (),
                kwargs=kwargs,
                dynamic_shapes=shapes,
                input_names=names,
                output_names=results,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever the tracer and the translation raise
        reason = explain(error.__cause__ or error)
        hint = "; --no-cache may help" if signature.cached else ""
        raise CheckpointError(f"torch.onnx cannot export {type(model).__name__}: {reason}{hint}") from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # the paths of the code on this machine, at every node
    file.parent.mkdir()
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
    logger.info(f"Writing the graph ({size / 1e6:.0f} MB)")
    onnx_ir.save(program.model, file, external_data=f"{file.name}_data" if size > SINGLE_FILE else None)
    return program.model.opset_imports[""]


@contextlib.contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
    with logging_at(logging.ERROR, *loggers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
