"""A loss on pre-activations that leave an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..activations import LearnableActivation
from ..errors import ConfigError
from ..fitting.options import is_interval
from .optimizer import activations_by_path


class DomainPenalty:
    r"""Adds to the loss of a model, in training mode,

        weight * (1/L) sum_l mean_i d(x_li)^2,    d(x) = x - clamp(x, lo, hi),

    the mean over the L learnable activations, and over all elements x_li of their pre-activations (padding included),
    of the squared distance to [lo, hi]. Activations without tails are wrong outside the interval that they were made
    for: the penalty keeps their inputs there.

    It is a matter of hooks on the model and on its activations, with nothing new in the state dict. Where the model
    returns a ``loss``, the penalty is in it: with ``Trainer``, Accelerate, DDP, FSDP2, gradient accumulation (under
    ``num_items_in_batch`` by the share of the labels, as the loss itself), ``torch.compile`` (create it first) and
    gradient checkpointing (not reentrant). Otherwise, as in a loop with a loss of its own, add ``penalty.loss()``::

        penalty = hf_ortho.DomainPenalty(model, 0.1, (-4.0, 4.0))
        loss = criterion(model(x), y) + penalty.loss()

    Args:
        model: any module with learnable activations, not wrapped.
        weight: at least 0, per squared unit of the pre-activation.
        interval: lo < hi, the same for all activations; the ``domain`` of each if None.

    Raises:
        ConfigError: the model has no learnable activations, a value is out of range, or ``interval`` is None and the
            domain of an activation is not finite.
    """

    def __init__(self, model: nn.Module, weight: float, interval: Sequence[float] | None = None):
        modules = activations_by_path(model)
        if not modules:
            raise ConfigError(f"DomainPenalty: {type(model).__name__} has no learnable activations; convert it first")
        if not 0.0 <= weight < math.inf:
            raise ConfigError(f"weight {weight!r} of DomainPenalty: must be finite and at least 0")
        if interval is not None and not is_interval(interval):
            raise ConfigError(f"interval {interval!r} of DomainPenalty: must be two finite numbers lo < hi")
        for path, module in modules.items() if interval is None else ():
            if not all(map(math.isfinite, module.domain.tolist())):
                raise ConfigError(f"DomainPenalty: the domain of {path} is {module.domain.tolist()}; give an interval")
        self.weight = weight
        self.interval = interval
        self._share = 1 / len(modules)
        self._shifts = _shifts(model)
        self._terms: list[Tensor] = []
        self._running = False
        self._handles = [module.register_forward_pre_hook(self._observe) for module in modules.values()]
        self._handles.append(model.register_forward_pre_hook(self._start))
        self._handles.append(model.register_forward_hook(self._finish, with_kwargs=True))

    @property
    def pending(self) -> bool:
        """Whether the last forward left a penalty that is in no loss yet."""
        return bool(self._terms)

    def loss(self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The penalty of the last forward, a scalar; once, and only if the model returned no loss.

        Args:
            labels, num_items_in_batch: of a loss that is divided by ``num_items_in_batch``: the penalty is then
                multiplied by the share that ``labels`` have in it.

        Raises:
            ConfigError: there was no forward in training mode since the last call, or the model's loss has it.
        """
        if not self._terms:
            raise ConfigError("DomainPenalty.loss(): the model's own loss has it, or no forward in training mode ran")
        total = self.weight * self._share * torch.stack(self._terms).sum()
        self._terms.clear()
        if labels is None or num_items_in_batch is None:
            return total
        counted = labels[..., 1:] if self._shifts else labels
        return total * counted.ne(-100).sum() / num_items_in_batch

    def remove(self) -> None:
        """Take the penalty off the model."""
        for handle in self._handles:
            handle.remove()

    def _start(self, model: nn.Module, args: tuple) -> None:
        left, self._running = bool(self._terms) and not self._running, model.training and torch.is_grad_enabled()
        self._terms.clear()
        if left:
            self._running = False
            raise ConfigError(
                "DomainPenalty: the loss of the last step is without it, as the model returned none; add "
                "penalty.loss() to the loss"
            )

    def _observe(self, module: LearnableActivation, args: tuple[Tensor, ...]) -> None:
        if not module.training:
            return
        lo, hi = module.domain.detach() if self.interval is None else self.interval
        term = _SquaredDistance.apply(args[0], lo, hi)
        if self._running:  # not when a checkpoint is computed again in the backward
            if not torch.is_grad_enabled():
                raise ConfigError("DomainPenalty: reentrant checkpointing drops its gradient; set use_reentrant=False")
            self._terms.append(term)

    @torch.compiler.disable  # a break of the graph where it ends
    def _finish(self, model: nn.Module, args: tuple, kwargs: dict, outputs):
        running, self._running = self._running, False
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if not running or loss is None:
            return None
        outputs["loss"] = loss + self.loss(kwargs.get("labels"), kwargs.get("num_items_in_batch"))
        return outputs


def _shifts(model: nn.Module) -> bool:
    """Whether ``Trainer`` counts the labels without the first of each row, as a causal language model does."""
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


class _SquaredDistance(torch.autograd.Function):
    """mean d(x)^2; keeps x, which the activation keeps anyway."""

    @staticmethod
    def forward(ctx, x, lo, hi):
        ctx.save_for_backward(x)
        ctx.lo, ctx.hi = lo, hi
        return _distance(x, lo, hi).square().mean()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (2 * g / x.numel() * _distance(x, ctx.lo, ctx.hi)).to(x.dtype), None, None


def _distance(x: Tensor, lo, hi) -> Tensor:
    x = x.to(LearnableActivation.compute_dtype(x))
    return x - x.clamp(lo, hi)
