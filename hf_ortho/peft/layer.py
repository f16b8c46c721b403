"""One activation of the base model, with the learnable activations of the adapters."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..activations import LearnableActivation
from ..activations.base import SHARED
from ..checkpoints.adapter import ATTRIBUTE
from ..errors import AdapterError
from ..partitioned import gathered


class OrthoLayer(nn.Module, BaseTunerLayer):
    """The activation of the active adapter, or of the base model if no adapter is active.

    Args:
        base_layer: the activation of the base model.

    Example:
        >>> import peft
        >>> adapted = peft.get_peft_model(model, hf_ortho.peft.OrthoConfig(activation="hermite_4"))
        >>> layer = adapted.get_submodule("base_model.model.transformer.h.0.mlp.act")
        >>> isinstance(layer, hf_ortho.peft.OrthoLayer), layer.activations["default"].name
        (True, 'hermite_4')
    """

    adapter_layer_names = (ATTRIBUTE,)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        setattr(self, ATTRIBUTE, nn.ModuleDict())
        self.merged_adapters: list[str] = []

    @property
    def activations(self) -> nn.ModuleDict:
        """The learnable activations by adapter name."""
        return getattr(self, ATTRIBUTE)

    def update_layer(self, adapter_name: str, activation: LearnableActivation, fixed: dict[str, Tensor]) -> None:
        """Add an adapter. ``fixed`` holds its tail slopes and, without groups, its domain, which are saved in the
        config, not here."""
        for name in SHARED:
            value = getattr(activation, name).detach()
            delattr(activation, name)
            activation.register_buffer(name, fixed.get(name, value), persistent=name not in fixed)
        self.activations[adapter_name] = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.merged_adapters or ([] if self.disable_adapters else self.active_adapters)
        active = [name for name in names if name in self.activations]
        if len(active) > 1:
            raise AdapterError(
                f"adapters {', '.join(active)} are active at once: each activation can use only one of them"
            )
        return (self.activations[active[0]] if active else self.base_layer)(x)

    def check_merge(self, adapter_names: list[str], safe_merge: bool) -> list[str]:
        """The adapters among ``adapter_names`` that this layer has; raises as ``merge``."""
        names = [name for name in adapter_names if name in self.activations]
        together = list(dict.fromkeys([*self.merged_adapters, *names]))
        if len(together) > 1:
            raise AdapterError(f"adapters {', '.join(together)} cannot be merged together: merge one of them")
        parameters = [p for name in names for p in self.activations[name].parameters()]
        with gathered(parameters if safe_merge else ()):
            finite = not safe_merge or all(torch.isfinite(p).all() for p in parameters)
        if not finite:
            raise AdapterError(f"adapter {names[0]} has parameters that are not finite: it was not merged")
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Use one adapter in place of the base activation until ``unmerge``.

        Raises:
            AdapterError: several adapters would be merged, or, with ``safe_merge``, a parameter is not finite.
        """
        self.merged_adapters += self.check_merge(check_adapters_to_merge(self, adapter_names), safe_merge)

    def unmerge(self) -> None:
        """Undo ``merge``."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The activation that replaces this layer in a model without adapters."""
        if merge:
            self.merge(safe_merge, adapter_names)
        if not merge or not self.merged:
            return self.base_layer
        learned = cast(LearnableActivation, self.activations[self.merged_adapters[0]])
        return learned.whole().to(learned.domain.device).train(self.training)

    def _get_base_layer_device_and_dtype(self, base_layer):
        # An activation of the base model has no weights to take them from.
        return next(self.activations.buffers()).device, None

    def __repr__(self) -> str:
        return f"hf_ortho.{super().__repr__()}"
