"""Fill a folder with a model as an ONNX graph, its config, its processors and its other files."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from transformers.utils import logging

from ..checkpoints.load import Checkpoint, save_other_files
from ..checkpoints.place import GRAPH, GRAPH_DATA
from ..checkpoints.verify import check_weights
from ..hub.record import Graph
from ..tasks import head_of
from ..tasks.causal_lm import CAUSAL_LM
from .check import check_graph
from .graph import write_graph
from .signature import signature_of

logger = logging.get_logger("hf_ortho")


def write_onnx(checkpoint: Checkpoint, name: str, folder: Path, *, cache: bool = True) -> Graph:
    """Write ``onnx/model.onnx``, the files of the processors and the config to an existing folder.

    The graph has the names of Optimum: ``input_ids``, ``attention_mask``, ``position_ids`` (of models that generate
    text) and ``past_key_values.N.key``, ``.value`` to ``logits`` and ``present.N.key``, ``.value``; or
    ``token_type_ids``, or ``pixel_values``; or to ``last_hidden_state`` without a head. It contains the formulas of
    the activations, so that it needs no code. Before this function returns, it is compared with the model in
    onnxruntime.

    Args:
        checkpoint: a model in float32 on the CPU, from ``load_checkpoint``.
        name: where it was loaded from, for errors.
        cache: whether a model that generates text takes and returns a cache. A past of length zero starts a text.

    Raises:
        CheckpointError: the model takes other inputs than one text or one image, or torch cannot export it.
        OutputError: the outputs of the graph differ from those of the model.
    """
    model = checkpoint.model
    signature = signature_of(checkpoint, cache)
    check_weights(model, name)
    how = " with a cache" if signature.cached else " without a cache" if head_of(model) is CAUSAL_LM else ""
    logger.info(f"Exporting {type(model).__name__}{how}, which may take minutes")
    opset = write_graph(model, signature, folder / GRAPH)
    logger.info("Comparing the graph with the model in onnxruntime")
    difference = check_graph(folder / GRAPH, model, signature)
    config = model.config
    config.architectures = [type(model).__name__]
    if signature.cached or hasattr(config, "use_cache"):
        config.use_cache = signature.cached
    if (folder / GRAPH_DATA).is_file():
        setattr(config, "transformers.js_config", {"use_external_data_format": {Path(GRAPH).name: 1}})
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr]
    save_other_files(checkpoint, folder)
    return Graph(opset, signature.cached, difference, f"onnxruntime {version('onnxruntime')}")
