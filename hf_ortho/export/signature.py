"""The inputs and outputs of a model as an ONNX graph, named as in Optimum, and sample inputs."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, PreTrainedModel
from transformers.utils import logging

from ..checkpoints.load import Checkpoint, use_pad_token
from ..errors import CheckpointError
from ..files import explain
from ..tasks import head_of
from ..tasks.causal_lm import CAUSAL_LM

logger = logging.get_logger("hf_ortho")

MAIN = {"input_ids", "pixel_values", "input_features", "input_values"}  # the inputs of the modalities
KINDS = "text generation, classification, fill-mask and embeddings, of one text or one image"


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a graph takes and returns.

    Attributes:
        inputs: names of the inputs without the cache.
        outputs: names of the outputs without the cache.
        cached: whether the graph also takes the keys and values of past tokens, and returns them with the new ones.
        layers: number of layers of the cache.
        vocabulary: number of tokens; 0 for images.
        longest: the largest number of tokens.
        pad_token: the token at padded positions.
        image: shape of an image, (channels, height, width); None for texts.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    cached: bool = False
    layers: int = 0
    vocabulary: int = 0
    longest: int = 0
    pad_token: int = 0
    image: tuple[int, ...] | None = None

    def sample(self, batch: int, length: int, padded: int = 0) -> dict[str, Tensor]:
        """Random inputs; for texts, of ``length`` tokens, of which the last text has ``padded`` padded ones.

        Texts to continue (with ``position_ids``) are padded on the left, others on the right.
        """
        generator = torch.Generator().manual_seed(batch * 1000 + length)
        if self.image is not None:
            return {self.inputs[0]: torch.randn(batch, *self.image, generator=generator)}
        length = min(length, self.longest)
        places = slice(0, padded) if "position_ids" in self.inputs else slice(length - padded, length)
        ids = torch.randint(0, self.vocabulary, (batch, length), generator=generator)
        ids = torch.where(ids == self.pad_token, (ids + 1) % self.vocabulary, ids)
        mask = torch.ones_like(ids)
        if padded:
            mask[-1, places], ids[-1, places] = 0, self.pad_token
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "token_type_ids": torch.randint(0, 2, ids.shape, generator=generator),
        }
        return {name: values[name] for name in self.inputs}

    @property
    def cache_names(self) -> list[tuple[str, str]]:
        """(name of the input, name of the output) of each tensor of the cache."""
        parts = [f"{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]
        return [(f"past_key_values.{part}", f"present.{part}") for part in parts]


class Exportable(torch.nn.Module):
    """A model that takes and returns tensors only, and the cache as (key, value) of each layer."""

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...]):
        super().__init__()
        self.model, self.outputs = model, outputs
        self.has_cache = "use_cache" in inspect.signature(model.forward).parameters

    def forward(self, inputs: dict[str, Tensor], past: list[tuple[Tensor, Tensor]] | None = None):
        options: dict[str, Any] = {"use_cache": False} if self.has_cache else {}
        if past is not None:
            options = {"past_key_values": DynamicCache(past), "use_cache": True}
        found = self.model(**inputs, **options)
        outputs = [found[name] for name in self.outputs]
        return outputs if past is None else (outputs, cache_of(found))


def cache_of(result: Any) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer, (batch, heads, length, size); empty for a cache of another kind."""
    cache = result.get("past_key_values")
    layers = cache.layers if isinstance(cache, DynamicCache) else []
    pairs = [(layer.keys, layer.values) for layer in layers if isinstance(layer, DynamicLayer)]
    found = [(key, value) for key, value in pairs if key is not None and value is not None]
    return found if len(found) == len(layers) else []


def signature_of(checkpoint: Checkpoint, cache: bool) -> Signature:
    """The signature of a model.

    Args:
        cache: whether the graph of a model that generates text has a cache.

    Raises:
        CheckpointError: the model takes other inputs than one text or one image.
    """
    model = checkpoint.model
    _check_kind(model)
    accepted = inspect.signature(model.forward).parameters
    generates = head_of(model) is CAUSAL_LM
    if model.main_input_name == "pixel_values":
        signature = Signature(("pixel_values",), image=_image_shape(checkpoint))
    else:
        names = ["input_ids", "attention_mask", "position_ids" if generates else "token_type_ids"]
        if not _has_token_types(checkpoint):
            names = [name for name in names if name != "token_type_ids"]
        signature = Signature(tuple(name for name in names if name in accepted), **_tokens(checkpoint))
    cache = cache and generates
    options = {"use_cache": True} if cache else {}
    try:
        with torch.no_grad():
            found = model(**signature.sample(2, 6), **options)
        pairs = cache_of(found) if cache else []
    except Exception as error:  # whatever the model raises without its other inputs
        raise CheckpointError(
            f"{type(model).__name__} cannot be exported, it fails on {', '.join(signature.inputs)} alone "
            f"({explain(error)}); what can be exported is {KINDS}"
        ) from error
    outputs = [name for name, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if "last_hidden_state" in outputs:  # a pooler may be untrained, and Optimum leaves it out too
        outputs = [name for name in outputs if name != "pooler_output"]
    if cache and not pairs:
        logger.warning(f"note: the cache of {type(model).__name__} is not one of keys and values; exported without it")
    return dataclasses.replace(signature, outputs=tuple(outputs), cached=bool(pairs), layers=len(pairs))


def _check_kind(model: PreTrainedModel) -> None:
    name, modalities = type(model).__name__, model.input_modalities
    accepted = inspect.signature(model.forward).parameters
    kind = ""
    if model.config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif not isinstance(modalities, str) and len(modalities) > 1 and len(MAIN & accepted.keys()) > 1:
        kind = f"a model of {' and '.join(modalities)}"
    elif model.main_input_name not in ("input_ids", "pixel_values"):
        kind = f"a model of {model.main_input_name}"
    if kind:
        raise CheckpointError(f"{name} is {kind}, which cannot be exported; what can be exported is {KINDS}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise CheckpointError(f"{name} is quantized; export the original model, and quantize the graph")


def _has_token_types(checkpoint: Checkpoint) -> bool:
    known = getattr(checkpoint.tokenizer, "model_input_names", ["token_type_ids"])
    return "token_type_ids" in known and (getattr(checkpoint.model.config, "type_vocab_size", None) or 0) > 1


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if model.config.get_text_config().pad_token_id is None and getattr(tokenizer, "pad_token_id", None) is not None:
        use_pad_token(model, tokenizer)
    config: Any = model.config.get_text_config()
    if config.pad_token_id is None and hasattr(model, "score"):
        raise CheckpointError(
            f"{type(model).__name__} classifies at the last token that is no padding, but has no pad token; set "
            "pad_token_id in its config.json"
        )
    longest = getattr(config, "max_position_embeddings", None) or 1024
    return {"vocabulary": config.vocab_size, "longest": longest - 2, "pad_token": config.pad_token_id or 0}


def _image_shape(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape of the images that the processor makes from any image, or that the config names."""
    processor = checkpoint.image_processor
    if processor is not None and getattr(processor, "do_resize", True):
        blank = np.zeros((300, 300, 3), np.uint8)
        return tuple(processor(blank, return_tensors="pt")["pixel_values"].shape[1:])
    config: Any = checkpoint.model.config
    size = getattr(config, "image_size", 224)
    return (config.num_channels, *((size, size) if isinstance(size, int) else size))
