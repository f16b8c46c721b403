"""A penalty on pre-activations outside an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..activations import LearnableActivation
from ..errors import ConfigError
from ..fitting.options import is_interval
from ..kernels.groups import broadcasting
from ..partitioned import gathered
from .paths import activations_by_path


class DomainPenalty:
    r"""Adds a penalty to the loss of a model in training mode:

        weight * (1/L) sum_l mean_i d(x_li)^2,    d(x) = x - clamp(x, lo, hi).

    This is the squared distance of pre-activations to [lo, hi], averaged over the L learnable activations and over all
    elements x_li of their inputs (padding included). Activations without tails are only accurate on the interval that
    they were fitted on, and the penalty keeps their inputs there.

    The penalty uses hooks on the model and its activations. It adds nothing to the state dict. If the model returns a
    ``loss``, the penalty is included. This works with ``Trainer``, Accelerate, DDP, FSDP2, gradient accumulation (with
    ``num_items_in_batch``, scaled by the share of the labels, like the loss itself), ``torch.compile`` (create the
    penalty first) and non-reentrant gradient checkpointing. If you compute the loss yourself, add ``penalty.loss()``::

        loss = criterion(model(x), y) + penalty.loss()

    Args:
        model: any unwrapped module with learnable activations.
        weight: weight per squared unit of the pre-activation, at least 0.
        interval: (lo, hi) with lo < hi for all activations; default: the ``domain`` of each activation,
            or of each of its groups of channels.

    Raises:
        ConfigError: the model has no learnable activations, a value is out of range, or ``interval`` is None and the
            domain of an activation is not finite.

    Example:
        >>> net = torch.nn.Sequential(hf_ortho.activations.build("hermite_3"))
        >>> penalty = hf_ortho.DomainPenalty(net, weight=0.5, interval=(-1.0, 1.0))
        >>> y = net(torch.tensor([0.0, 3.0]))
        >>> penalty.loss().item()  # 0.5 * mean(0^2, 2^2)
        1.0
    """

    def __init__(self, model: nn.Module, weight: float, interval: Sequence[float] | None = None):
        modules = activations_by_path(model)
        if not modules:
            raise ConfigError(f"DomainPenalty: {type(model).__name__} has no learnable activations; convert it first")
        if not 0.0 <= weight < math.inf:
            raise ConfigError(f"DomainPenalty: weight {weight!r} must be finite and at least 0")
        if interval is not None and not is_interval(interval):
            raise ConfigError(f"DomainPenalty: interval {interval!r} must be two finite numbers lo < hi")
        given = modules if interval is None else {}
        with gathered(module.domain for module in given.values()):
            for path, module in given.items():
                for ends in module.domain.reshape(-1, 2).tolist():
                    if not all(map(math.isfinite, ends)):
                        raise ConfigError(f"DomainPenalty: the domain of {path} is {ends}; give an interval")
        self.weight = weight
        self.interval = interval
        self._share = 1 / len(modules)
        self._shifts = _shifts(model)
        self._terms: list[Tensor] = []
        self._running = False
        # After the forward and before the hooks of engines, which shard the domain outside of it.
        self._handles = [module.register_forward_hook(self._observe, prepend=True) for module in modules.values()]
        self._handles.append(model.register_forward_pre_hook(self._start))
        self._handles.append(model.register_forward_hook(self._finish, with_kwargs=True))

    @property
    def pending(self) -> bool:
        """Whether the penalty of the last forward has not been added to a loss yet."""
        return bool(self._terms)

    def loss(self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The penalty of the last forward, a scalar. Call it once per forward, and only if the model returns no loss.

        Args:
            labels, num_items_in_batch: for a loss that is divided by ``num_items_in_batch``: scale the penalty by the
                share of ``labels`` in it.

        Raises:
            ConfigError: no forward in training mode since the last call, or the loss of the model includes the penalty.

        """
        if not self._terms:
            raise ConfigError(
                "DomainPenalty.loss(): the loss of the model already includes it, or no forward in training mode ran"
            )
        total = self.weight * self._share * torch.stack(self._terms).sum()
        self._terms.clear()
        if labels is None or num_items_in_batch is None:
            return total
        counted = labels[..., 1:] if self._shifts else labels
        return total * counted.ne(-100).sum() / num_items_in_batch

    def remove(self) -> None:
        """Remove the penalty from the model."""
        for handle in self._handles:
            handle.remove()

    def _start(self, model: nn.Module, args: tuple) -> None:
        unused, self._running = bool(self._terms) and not self._running, model.training and torch.is_grad_enabled()
        self._terms.clear()
        if unused:
            self._running = False
            raise ConfigError(
                "DomainPenalty: missing from the loss of the last step, because the model returned no loss; add "
                "penalty.loss() to your loss"
            )

    def _observe(self, module: LearnableActivation, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not module.training:
            return
        x, domain, _ = broadcasting(args[0], module.domain.detach(), module.tail_slopes)
        term = _SquaredDistance.apply(x, *(domain if self.interval is None else self.interval))
        if self._running:  # not when gradient checkpointing recomputes the forward
            if not torch.is_grad_enabled():
                raise ConfigError("DomainPenalty: reentrant checkpointing drops the gradient; set use_reentrant=False")
            self._terms.append(term)

    @torch.compiler.disable  # breaks the graph at its end
    def _finish(self, model: nn.Module, args: tuple, kwargs: dict, outputs):
        running, self._running = self._running, False
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if not running or loss is None:
            return None
        outputs["loss"] = loss + self.loss(kwargs.get("labels"), kwargs.get("num_items_in_batch"))
        return outputs


def _shifts(model: nn.Module) -> bool:
    """Whether ``Trainer`` skips the first label of each row when it counts labels, as for a causal language model."""
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


class _SquaredDistance(torch.autograd.Function):
    """mean d(x)^2. Saves only x, which the activation saves anyway."""

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
