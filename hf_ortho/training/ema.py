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
    """average <- decay * average + (1 - decay) * weight after every optimizer step, starting at the first.

    Trained parameters are averaged; frozen parameters and buffers are not. The averages are part of the optimizer
    state, so checkpoints include them. The model file of a checkpoint holds the weights needed to resume training. At
    the end of training, the model takes the averages.

    Example:
        >>> from transformers import TrainingArguments
        >>> from hf_ortho.training import ActivationTrainer, ExponentialMovingAverage
        >>> average = ExponentialMovingAverage(decay=0.999)
        >>> arguments = TrainingArguments("out", report_to=[])
        >>> trainer = ActivationTrainer(model, arguments, callbacks=[average])
        >>> trainer.average = average  # evaluate the averaged weights
    """

    def __init__(self, decay: float):
        self.update = get_ema_multi_avg_fn(decay)

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Start the averages at the first step of ``optimizer``, before any checkpoint is loaded.

        FSDP2 takes this step with zero gradients, and only loads the entries that are then in the state.
        """

        def begin(optimizer, args, kwargs) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                state = optimizer.state[parameter]
                if KEY not in state:
                    state[KEY] = parameter.detach().clone()

        optimizer.register_step_post_hook(begin)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if getattr(optimizer, "step_was_skipped", False):  # by the GradScaler of fp16
            return
        averages, weights = [], []
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            state = optimizer.state[parameter]
            if KEY in state:
                averages.append(state[KEY])
                weights.append(parameter.detach())
            else:
                state[KEY] = parameter.detach().clone()
        if averages:
            self.update(averages, weights, None)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        _assign(_averages(optimizer))

    @contextlib.contextmanager
    def applied(self, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """Within the block, the model has the averages as its weights."""
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
