"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

KEY = "ema"


class ExponentialMovingAverage(TrainerCallback):
    """average <- decay * average + (1 - decay) * weight after every optimizer step, from the weights after the first.

    Trained parameters are averaged; frozen ones and buffers are the model's own. The averages are part of the
    optimizer's state, so that checkpoints hold them (a checkpoint's model file holds the weights that training goes on
    with). When the training ends the model takes its averages.
    """

    def __init__(self, decay: float):
        self.update = get_ema_multi_avg_fn(decay)

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the first step of ``optimizer`` begin the averages, before any checkpoint is loaded.

        FSDP2 takes such a step with zero gradients, and loads sharded only what the state then has.
        """

        def begin(optimizer, args, kwargs) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                kept = optimizer.state[parameter]
                if KEY not in kept:
                    kept[KEY] = parameter.detach().clone()

        optimizer.register_step_post_hook(begin)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if getattr(optimizer, "step_was_skipped", False):  # by fp16's GradScaler
            return
        averages, weights = [], []
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            kept = optimizer.state[parameter]
            if KEY in kept:
                averages.append(kept[KEY])
                weights.append(parameter.detach())
            else:
                kept[KEY] = parameter.detach().clone()
        if averages:
            self.update(averages, weights, None)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        _assign(_averages(optimizer))

    @contextlib.contextmanager
    def applied(self, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """The model of ``optimizer`` has its averages inside the block, and its weights again after it."""
        averages = _averages(optimizer)
        weights = [(parameter, parameter.detach().clone()) for parameter, _ in averages]
        try:
            _assign(averages)
            yield
        finally:
            _assign(weights)


def _averages(optimizer: torch.optim.Optimizer | None) -> list[tuple[nn.Parameter, Tensor]]:
    if optimizer is None:
        return []
    parameters = (p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state)
    return [(p, optimizer.state[p][KEY]) for p in parameters if KEY in optimizer.state[p]]


@torch.no_grad()
def _assign(values: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in values:
        parameter.copy_(value)
