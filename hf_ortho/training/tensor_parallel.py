"""Tensor parallelism with transformers: load a model in shards, and sum the gradients of its activations."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from ..activations import LearnableActivation
from ..errors import ConfigError


def sharding() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for the ``parallelism_config_tp_size`` of Accelerate."""
    size = int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))
    return {"distributed_config": DistributedConfig(tp_size=size)} if size > 1 else {}


def reduce_activation_gradients(model: PreTrainedModel) -> int:
    """Sum the gradients of activations over tensor-parallel processes; returns the number of these activations.

    An activation between sharded layers is replicated, but each process sees a slice of its inputs, so each gradient is
    partial. The ``replicated_with_grad_allreduce`` plan of transformers sums accumulated gradients, so it is only
    correct for one backward per step. This is correct for any number. Call it once, after the last change of modules.

    Raises:
        ConfigError: an activation with groups of channels is between sharded layers.

    Example:
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> hf_ortho.training.reduce_activation_gradients(model)  # no layer is sharded
        0
    """
    count = 0
    for path, module in model.named_modules():
        if isinstance(module, LearnableActivation):
            siblings = model.get_submodule(path.rpartition(".")[0]).children()
            weights = [getattr(sibling, "weight", None) for sibling in siblings]
            meshes = [w.device_mesh for w in weights if isinstance(w, DTensor)]
            if meshes and module.groups > 1:
                raise ConfigError(
                    f"{path}: {module.name} cannot be combined with tensor parallelism, where each process sees a part "
                    "of the channels; use multi_gpu or fsdp2"
                )
            for parameter in module.parameters(recurse=False) if meshes else ():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient, mesh=meshes[0]: _summed(gradient, mesh))
            count += bool(meshes)
    return count


def _summed(gradient: Tensor, mesh: DeviceMesh) -> Tensor:
    gradient = gradient.clone()
    torch.distributed.all_reduce(gradient, group=mesh.get_group())
    return gradient
