"""Learnable activations that the model does not call: known causes are refused, all others are reported."""

from __future__ import annotations

import logging
import re
from types import MethodType

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

from ..activations import LearnableActivation
from ..errors import ConfigError
from .paths import activations_by_path

logger = logging.getLogger("hf_ortho")

FUSED_EXPERTS = ("sonicmoe", "deepgemm_megamoe")  # of transformers; the others call the activation module
SHOWN = 3


def check_reached(model: nn.Module) -> None:
    """Check that no fused kernel computes an MLP with an activation of its own.

    Raises:
        ConfigError: a learnable activation belongs to experts with such an ``experts_implementation``, or to a module
            whose ``forward`` was replaced, as by ``use_kernels`` of transformers.
    """
    for path, module in model.named_modules():
        if not isinstance(module, LearnableActivation):
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        experts = getattr(getattr(parent, "config", None), "_experts_implementation", None)
        if experts in FUSED_EXPERTS and "experts" in type(parent).__name__.lower():
            raise ConfigError(
                f"experts_implementation {experts}: bypasses the learnable activation {path}; use grouped_mm, "
                "batched_mm or eager"
            )
        forward = vars(parent).get("forward")
        if isinstance(forward, MethodType) and forward.__func__ is not type(parent).forward:
            raise ConfigError(
                f"{forward.__func__.__qualname__} replaced the forward of {type(parent).__name__} and may bypass its "
                f"learnable activation {path}; load the model without kernels for its MLP (use_kernels, kernel_config)"
            )


class GradientWatch(TrainerCallback):
    """Trainer callback that reports, at the end of training, the activations that got no gradient in any step.

    Not for DeepSpeed, which keeps gradients elsewhere. Once all have had a gradient, nothing is left to check.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from hf_ortho.training.unreached import GradientWatch
        >>> trainer = Trainer(model, TrainingArguments("out", report_to=[]), callbacks=[GradientWatch()])
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._steps = 0
        trained = activations_by_path(model).items()
        self._waiting = {n: m for n, m in trained if any(p.requires_grad for p in m.parameters(recurse=False))}
        self._number = len(self._waiting)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._steps += 1
        if self._waiting:
            moved = torch.stack([_has_gradient(module, args.device) for module in self._waiting.values()]).tolist()
            self._waiting = {n: m for (n, m), done in zip(self._waiting.items(), moved, strict=True) if not done}

    def on_train_end(self, args, state, control, **kwargs):
        names = set.intersection(*map(set, gather_object([list(self._waiting)])))
        if not names or not self._steps or not state.is_world_process_zero:
            return
        ordered = [name for name in self._waiting if name in names]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        if all(re.search(r"\bexperts\.\d+\.", name) for name in names):
            reason = "no token was routed to these experts"
        else:
            reason = "a fused kernel may compute their layers, or their outputs do not reach the loss"
        logger.warning(
            f"note: {len(names)} of {self._number} learnable activations got no gradient in {self._steps} steps and "
            f"did not change: {', '.join(ordered[:SHOWN])}{more}; {reason}"
        )


def _has_gradient(module: LearnableActivation, device: torch.device) -> torch.Tensor:
    gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    return torch.stack([g.any().to(device) for g in local]).any() if local else torch.tensor(False, device=device)
