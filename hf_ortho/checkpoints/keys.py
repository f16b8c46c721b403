"""Check that the weights of a checkpoint and the tensors of its model are the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..activations import LearnableActivation
from ..errors import CheckpointError
from ..text import some
from .activations import NAMES

logger = logging.get_logger("hf_ortho")

COUNTER = ".num_batches_tracked"  # of a batch norm; not stored by old versions of torch, and not used in evaluation


def check_keys(
    name: str, model: PreTrainedModel, info: Mapping[str, Any], *, new_head: bool = False, replaced_head: bool = False
) -> tuple[str, ...]:
    """The paths of the modules that have new weights, after a check that these are allowed.

    This checks the ``loading_info`` of ``from_pretrained``: no tensor of ``model`` may have been initialized at random.

    Tied tensors and those that transformers declares optional are not in ``info``. Tensors that the model does not
    use, such as other heads, are noted in the log.

    Args:
        new_head: whether the head (the tensors outside the base model, and its pooler) may be missing or have other
            shapes.
        replaced_head: whether the caller replaces such a head, so that nothing need be noted.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the weights of an activation are not used.
    """
    base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or "-") else ""

    def needed(key: str) -> bool:
        return not key.endswith(COUNTER) and (not new_head or key.startswith(base))

    cls = type(model).__name__
    missing = sorted(key for key in info["missing_keys"] if needed(key) and not _is_computed(key, model))
    optional = [key for key in missing if _is_optional(key, model, new_head)]
    if lacking := [key for key in missing if key not in optional]:
        raise CheckpointError(f"{name} is incomplete: its weights lack {some(lacking, what='tensors')} of {cls}")
    absent = [key for key in info["missing_keys"] if new_head and not needed(key)]
    if fresh := sorted({*optional, *(() if replaced_head else absent)}):
        logger.warning(
            f"note: the weights of {name} lack {some(fresh, what='tensors')} of {cls}, which start at random"
        )
    if mismatched := sorted(entry for entry in info["mismatched_keys"] if needed(entry[0])):
        key, stored, expected = mismatched[0]
        more = f" ({len(mismatched) - 1} more)" if mismatched[1:] else ""
        raise CheckpointError(
            f"{name} does not fit its config: {key} has the shape {list(stored)}, not {list(expected)}{more}"
        )
    unexpected = sorted(info["unexpected_keys"])
    if activations := _of_activations(unexpected, model):
        raise CheckpointError(
            f"{name} does not fit its config, which does not name the activations of "
            f"{some(activations, what='tensors')}"
        )
    if unexpected:
        logger.warning(f"note: {cls} does not use {some(unexpected, what='tensors')} of {name}")
    replaced = [entry[0] for entry in info["mismatched_keys"] if not needed(entry[0])]
    poolers = [key for key in optional if new_head and "pooler" in key]
    return tuple(dict.fromkeys(_module(key, base) for key in sorted([*absent, *replaced, *poolers])))


def _module(key: str, base: str) -> str:
    """The head with a parameter, or the pooler in the base model."""
    within = base if key.startswith(base) else ""
    return within + key.removeprefix(within).partition(".")[0]


def _is_computed(key: str, model: PreTrainedModel) -> bool:
    """Whether a parameter is a table of sines, which transformers computes, as in Pegasus."""
    return "Sinusoidal" in type(model.get_submodule(key.rpartition(".")[0])).__name__


def _is_optional(key: str, model: PreTrainedModel, new_head: bool) -> bool:
    """Whether many checkpoints lack a parameter: the mask of SpecAugment, or the pooler below no head or a new one."""
    without_head = new_head or model.base_model is model or model.config.is_encoder_decoder
    return key.endswith("masked_spec_embed") or (without_head and bool(re.search(r"(^|\.)pooler\.", key)))


def _of_activations(unexpected: list[str], model: PreTrainedModel) -> list[str]:
    """Those of the tensors that ``model`` does not have which belong to learnable activations."""
    known = {path for path, module in model.named_modules() if isinstance(module, LearnableActivation)}
    leaves = defaultdict(set)
    for key in unexpected:
        leaves[key.rpartition(".")[0]].add(key.rpartition(".")[2])
    found = {path: names & NAMES for path, names in leaves.items()}
    paths = {path for path, names in found.items() if len(names) > 1 or names & {"tail_slopes", "coefficients"}}
    return [
        key
        for key in unexpected
        if (path := key.rpartition(".")[0]) in known or (path in paths and key.rpartition(".")[2] in NAMES)
    ]
