"""Changes to the training code of other libraries, which do not know learnable activations.

Importing ``hf_ortho`` applies each of them once the library in question is imported. This may be in the middle of
importing transformers, which ``..activations`` needs, so that is imported later.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError

logger = logging.getLogger("hf_ortho")

LIGER_ACTIVATIONS = ("swiglu", "geglu", "relu_squared")


def exempt_from_weight_decay(trainer: Any) -> None:
    """Let ``Trainer`` of the module ``transformers.trainer``, and its subclasses, not decay learnable activations.

    Its rule excludes norms and biases, by class and by name. Decay pulls an activation toward f = 0.
    """
    original = trainer.Trainer.get_decay_parameter_names

    @functools.wraps(original)
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        from .policies import activation_parameters

        learned = activation_parameters(model)
        return [name for name in original(self, model) if name not in learned]

    trainer.Trainer.get_decay_parameter_names = get_decay_parameter_names


def report_weight_decay(accelerator: Any) -> None:
    """Let ``prepare`` of the module ``accelerate.accelerator`` say once if an optimizer decays learnable activations.

    It sees the optimizers of a training loop of one's own, and those that are passed to a Trainer.
    """
    original = accelerator.Accelerator.prepare

    @functools.wraps(original)
    def prepare(self, *args, **kwargs):
        models = (model for model in (*self._models, *args) if isinstance(model, nn.Module))
        learned = {id(p) for model in models for m in _activations(model).values() for p in m.parameters()}
        for optimizer in args:
            for group in optimizer.param_groups if learned and isinstance(optimizer, Optimizer) else ():
                decay = group.get("weight_decay") and "pattern" not in group  # asked for by name in param_groups
                if decay and any(id(p) in learned and p.requires_grad for p in group["params"]):
                    _say_once(
                        f"note: the optimizer decays learnable activations (weight_decay {group['weight_decay']:g}), "
                        "which pulls them toward 0; give it the groups of hf_ortho.param_groups(model, ...)"
                    )
        return original(self, *args, **kwargs)

    accelerator.Accelerator.prepare = prepare


def keep_from_liger(liger: Any) -> None:
    """Let the module ``liger_kernel.transformers`` not bypass learnable activations (``use_liger_kernel``).

    The MLPs of liger-kernel compute SiLU, GELU or ReLU^2 themselves, and ignore the activation module of the model.
    """
    original = liger._apply_liger_kernel_to_instance

    @functools.wraps(original)
    def apply(model: nn.Module, **options: Any) -> None:
        names = list(_activations(model))
        before = _owners(model, names)
        if names:
            options |= dict.fromkeys(LIGER_ACTIVATIONS, False)
            logger.warning(
                f"note: use_liger_kernel: {', '.join(LIGER_ACTIVATIONS)} stay off, because they would compute another "
                f"activation in place of the learnable one; the other kernels of liger-kernel are used"
            )
        original(model=model, **options)
        if replaced := [name for name, owner in before.items() if _owners(model, [name]).get(name) != owner]:
            raise ConfigError(
                f"use_liger_kernel: liger-kernel bypasses the learnable activation {replaced[0]} of "
                f"{type(model).__name__}, and has no option against it; set use_liger_kernel to false"
            )

    liger._apply_liger_kernel_to_instance = apply


def _activations(model: nn.Module) -> dict[str, nn.Module]:
    from ..activations import LearnableActivation

    return {name: module for name, module in model.named_modules() if isinstance(module, LearnableActivation)}


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _owners(model: nn.Module, names: list[str]) -> dict[str, tuple]:
    """For each activation: its identity, and the forward of the module that calls it."""
    modules = dict(model.named_modules())
    return {
        name: (id(modules[name]), vars(modules[name.rpartition(".")[0]]).get("forward"))
        for name in names
        if name in modules
    }
