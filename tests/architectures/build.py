"""A tiny model of any model type, with random weights and inputs that drive it, from shrunken default configs."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 320
POSITIONS = 128
LARGEST = 60_000_000  # parameters
FACTORS = (8, 4, 1)  # of the widths, tried in this order
HEADS = ("ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM",
         "MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "PRETRAINING",
         "SEQUENCE_CLASSIFICATION", "OBJECT_DETECTION", "VIDEO_CLASSIFICATION")  # fmt: skip
MAPPINGS = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in HEADS] + [
    modeling_auto.MODEL_MAPPING_NAMES,
    *(getattr(modeling_auto, name) for name in dir(modeling_auto) if re.fullmatch("MODEL_FOR_.*_MAPPING_NAMES", name)),
]

WIDTH = re.compile(
    r"size|dim|rank|channel|embd|embed|d_model|d_ff|d_kv|dff|ffn|inner|units|planes|hidden|width|mlp|filters"
)
NO_WIDTH = re.compile(
    r"vocab|image|img|patch|window|kernel|position|stride|ratio|factor|type|chunk|block|bucket|cardinal|crop|spec|num_"
    r"|codebook_size|pool|max_|min_|feat_sizes|layers|heads|grid|resolution|context|expan|mult|feature_projection"
    r"|feature_size|input_feat"
)
LAYERS = re.compile(r"(n|num|\w*_layers?|\w*_blocks?)?_?(layers?|blocks)|\w*depth|\w*num_\w*layers|\w*_layers")
NO_LAYERS = re.compile(r".*(feat_extract|postnet|no_rope|kv_shared|nextn|dense|feature_layer|add_layers|per_|every)\w*")
DEPTHS = re.compile(r"depths|stage_num_blocks|blocks_per_stage|num_block_repeats|layers_per_\w+|stage_numb_of_layers")
EXPERTS = re.compile(r"(n|num|moe_num)_?(routed|local|)_?experts")


class CannotBuild(Exception):
    """There is no model class, or no config that this module makes fits it."""


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class with a head where the auto classes know one, else the base class."""
    for mapping in MAPPINGS:
        names = mapping.get(model_type, ())
        for name in [names] if isinstance(names, str) else names:
            if hasattr(transformers, name):
                return getattr(transformers, name)
    raise CannotBuild("no model class in the auto mappings")


def _small(key: str, value, factor: int):
    """The shrunken value of one config field."""
    if isinstance(value, dict):
        return {k: _sections(v, factor) if k == "mrope_section" else v for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if DEPTHS.fullmatch(key) and all(isinstance(v, int) for v in value):
            return type(value)(1 for _ in value)
        return type(value)(_small(key, v, factor) for v in value) if WIDTH.search(key) else value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.search(r"(_id|_index|_token)$", key):
        return value if value < VOCABULARY else VOCABULARY - 1 - sum(map(ord, key)) % 64
    if "vocab_size" in key:
        return min(value, VOCABULARY)
    if re.search(r"max_\w*positions?|n_positions|position_embeddings|n_ctx", key):
        return min(value, POSITIONS)
    if re.fullmatch(r"(image|img|input)_size", key):
        return min(value, 64)
    if key == "window_size":
        return min(value, 2)
    if EXPERTS.fullmatch(key):
        return min(value, 8)
    if key in ("n_group", "topk_group", "num_expert_group"):
        return 1
    if LAYERS.fullmatch(key) and not NO_LAYERS.fullmatch(key):
        return min(value, 2)
    if WIDTH.search(key) and not NO_WIDTH.search(key) and value >= 16 and value % factor == 0:
        return value // factor
    return value


def _sections(sizes: list[int], factor: int) -> list[int]:
    """Parts of a rotary embedding whose sum shrinks by ``factor`` as well."""
    small = [size // factor for size in sizes]
    return [*small[:-1], small[-1] + sum(sizes) // factor - sum(small)]


def shrink(config: PreTrainedConfig, factor: int) -> PreTrainedConfig:
    """The same kind of config with few layers and experts, a small vocabulary, and widths divided by ``factor``."""
    default = vars(type(config)())
    changes = {}
    for key, value in vars(config).items():
        if key.startswith("_") or key in ("transformers_version", "architectures", "id2label", "label2id"):
            continue
        new = shrink(value, factor) if isinstance(value, PreTrainedConfig) else _small(key, value, factor)
        if key == "image_size" and isinstance(getattr(config, "patch_size", None), int) and isinstance(new, int):
            new = max(new - new % config.patch_size, 2 * config.patch_size)
        if isinstance(value, PreTrainedConfig) or new != default.get(key):
            changes[key] = new
    for key in ("layer_types", "layers_block_type"):
        if isinstance(changes.get(key), list):
            changes[key] = changes[key][: changes.get("num_hidden_layers")]
    return type(config)(**changes)


def tiny_models(model_type: str) -> Iterator[PreTrainedModel]:
    """Seeded models of at most 60M parameters in evaluation mode, the smallest first.

    Raises:
        CannotBuild: no config that this module makes fits the class.
    """
    cls = model_class(model_type)
    reasons, built = [], False
    for factor in FACTORS:
        try:
            config = shrink(CONFIG_MAPPING[model_type](**OVERRIDES.get(model_type, {})), factor)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > LARGEST:
                raise CannotBuild(f"{size} parameters with widths divided by {factor}")
            torch.manual_seed(0)
            model = randomise(cls(config)).eval()
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        else:
            built = True
            yield model
    if not built:
        raise CannotBuild(reasons[0])


@torch.no_grad()
def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that carry signals of order one, so that a wrong activation shows in the outputs."""
    generator = torch.Generator().manual_seed(0)
    padded = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None]
    for parameter in model.parameters():
        if not parameter.requires_grad:  # sinusoids, which classes compute anew after loading
            continue
        if parameter.ndim > 1 and parameter.is_floating_point():
            fan = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[1]
            gain = 2.0 if parameter.ndim == 4 else 1.0  # few convolutional nets normalize what they pass on
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (gain / max(fan, 1)) ** 0.5)
        elif parameter.is_floating_point():
            tiny = parameter.abs().max() < 1e-2 and parameter.abs().min() > 0  # a layer scale that hides its branch
            if tiny or not torch.isfinite(parameter).all():
                parameter.fill_(1.0)
    for embedding in padded:
        embedding.weight[embedding.padding_idx] = 0.0  # where some classes put it back after loading
    return model


# ---- inputs --------------------------------------------------------------------------------------------------------


def _find(config: PreTrainedConfig, *names: str, default: int = 0):
    """The first of ``names`` in a config or its sub-configs."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig) and (found := _find(value, *names)):
            return found
    return default


def _image(config: PreTrainedConfig) -> tuple[int, int, int]:
    size = _find(config, "image_size", "img_size", default=64)
    height, width = (
        (size, size) if isinstance(size, int) else size[-2:] if isinstance(size, (list, tuple)) else (64, 64)
    )
    return _find(config, "num_channels", "in_channels", "in_chans", default=3), height, width


def _kinds(config: PreTrainedConfig) -> dict[str, list[tuple[int, ...]]]:
    """Shapes to try for each kind of input; integers are token ids."""
    channels, height, width = _image(config)
    frames = _find(config, "num_frames", default=4)
    bins = _find(
        config,
        "feature_projection_input_dim",
        "num_mel_bins",
        "feature_size",
        "input_dim",
        "input_feat_size",
        default=80,
    )
    spectrum = 2 * _find(config, "max_source_positions", default=64)
    return {
        "input_ids": [(1, 16)],
        "decoder_input_ids": [(1, 6)],
        "bbox": [(1, 16, 4)],
        "pixel_values": [(1, channels, height, width), (1, frames, channels, height, width)],
        "pixel_values_videos": [(1, frames, channels, height, width)],
        "pixel_values_images": [(1, channels, height, width)],
        "input_values": [(1, 4000), (1, 1, 4000), (1, _find(config, "max_length", default=1024), bins)],
        "input_features": [(1, bins, spectrum), (1, spectrum, bins), (1, 64, bins)],
        "audio_values": [(1, 4000)],
    }


def candidate_inputs(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Inputs that may drive ``model``, the most complete ones first."""
    accepted = inspect.signature(model.forward).parameters
    shapes = {key: value for key, value in _kinds(model.config).items() if key in accepted}
    generator = torch.Generator().manual_seed(1)

    def make(key: str, shape: tuple[int, ...]) -> Tensor:
        if key == "bbox":
            return torch.zeros(shape, dtype=torch.long)
        if key.endswith("_ids"):
            return torch.randint(
                5, min(_find(model.config, "vocab_size", default=200), 200), shape, generator=generator
            )
        return torch.randn(shape, generator=generator)

    main = [key for key in (model.main_input_name, "decoder_input_ids", "bbox") if key in shapes]
    sets = [list(shapes), main, main[:1], [k for k in shapes if k in ("input_ids", "decoder_input_ids")]]
    for keys in dict.fromkeys(tuple(keys) for keys in sets if keys):
        for chosen in itertools.product(*(shapes[key] for key in keys)):
            yield {key: make(key, shape) for key, shape in zip(keys, chosen, strict=True)}


RESNET = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_kwargs": None}
RESNET["backbone_config"] = {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}

OVERRIDES: dict[str, dict] = {
    "autoformer": {"prediction_length": 8},
    "conditional_detr": RESNET,
    "dab-detr": RESNET,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": RESNET,
    "detr": RESNET,
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "informer": {"prediction_length": 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "table-transformer": RESNET,
    "time_series_transformer": {"prediction_length": 8},
    "zamba": {"num_hidden_layers": 2, "layers_block_type": ["hybrid", "hybrid"]},  # two blocks that are tied
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["hybrid", "hybrid"]},
}
