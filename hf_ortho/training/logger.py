"""A Trainer callback that records the activations."""

from __future__ import annotations

import inspect
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.trainer_callback import CallbackHandler

from ..activations import LearnableActivation
from ..errors import ConfigError
from ..kernels.groups import broadcasting
from ..partitioned import gathered
from ..path_patterns import thin
from ..processes import collective_device, max_over_processes, sum_over_processes
from . import history
from .paths import activations_by_path

GROUPS = 16  # most groups of an activation whose gains are computed


class ActivationLogger(TrainerCallback):
    """Trainer callback that records the learnable activations of a model at regular steps.

    It records for each activation:

    - all parameters except the tail slopes; with groups of channels, the minimum, median and maximum over the groups;
    - ``gain``, ``gain_derivative``: E[f^2] and E[f'^2] under N(0, 1), averaged over at most 16 groups;
    - statistics of the pre-activations in the batch, over all processes and including padding: ``minimum``,
      ``maximum``, ``mean``, ``std``, and ``outside``, the fraction outside the domain.

    Other steps have no overhead. A recorded step of a compiled model runs uncompiled, as compiled code ignores new
    hooks.

    Scalars are sent to the integrations in ``report_to`` under ``activations/``, but not to the console or
    ``log_history``. TensorBoard, trackio and wandb also get a figure of the current and initial shapes. The history is
    saved to ``output_dir/activations``, one file per step; plot it with ``hf-ortho plot --history output_dir``. A
    resumed training continues it. DDP, FSDP2 and DeepSpeed ZeRO-3 are supported.

    Args:
        every: number of steps between records; default: ``logging_steps``.
        picture_every: number of steps between figures, 0 for none; default: every tenth record.

    Raises:
        ConfigError: a value is out of range, or, at the start of training, the model has no learnable activations.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> logger = hf_ortho.ActivationLogger(every=100)
        >>> trainer = Trainer(model, TrainingArguments("out", report_to=[]), callbacks=[logger])
    """

    def __init__(self, every: int | None = None, picture_every: int | None = None):
        for name, value, least in (("every", every, 1), ("picture_every", picture_every, 0)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"ActivationLogger: {name} {value!r} must be an integer and at least {least}")
        self.every = every
        self.picture_every = picture_every
        self._watched: list[_Moments] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._modules = activations_by_path(model)
        if not self._modules:
            raise ConfigError(
                f"ActivationLogger: {type(model).__name__} has no learnable activations; convert it first"
            )
        self._integrations: list[Any] = [
            c for c in _handler().callbacks if isinstance(c, tuple(INTEGRATION_TO_CALLBACK.values()))
        ]
        self._every = self.every or max(1, int(args.logging_steps))
        self._picture_every = 10 * self._every if self.picture_every is None else self.picture_every
        if state.is_world_process_zero:
            history.drop_after(args.output_dir, state.global_step)
        if state.global_step == 0:
            self._record(args, state, control, model)

    def on_step_begin(self, args, state, control, **kwargs):
        if (state.global_step + 1) % self._every == 0:
            self._set_stance("force_eager")
            self._watched = [_Moments(module) for module in self._modules.values()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._watched:
            self._set_stance("default")
            self._record(args, state, control, model)

    @staticmethod
    def _set_stance(stance: str) -> None:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and this would import it
            torch.compiler.set_stance(stance)

    def _record(self, args, state, control, model) -> None:
        moments = [watched.close() for watched in self._watched]
        self._watched = []
        with gathered(p for module in self._modules.values() for p in module.parameters()):  # all at once
            modules = {path: module.whole() for path, module in self._modules.items()}
        if not state.is_world_process_zero:
            return
        statistics = {}
        for i, (path, module) in enumerate(modules.items()):
            members = module.members()
            gains = [members[i].gain() for i in thin(len(members), GROUPS)]
            gain, gain_derivative = map(fmean, zip(*gains, strict=True))
            statistics[path] = {"gain": gain, "gain_derivative": gain_derivative} | (moments[i] if moments else {})
        history.write_step(args.output_dir, state.global_step, modules, statistics)
        scalars = {f"activations/{p}.{key}": value for p, values in statistics.items() for key, value in values.items()}
        for path, module in modules.items():
            for name, values in module.named_parameters():
                if name != "tail_slopes":
                    scalars |= _entries(f"activations/{path}.{name}", values.detach())
        finite = {key: value for key, value in scalars.items() if math.isfinite(value)}  # domains may be infinite
        for integration in self._integrations:
            integration.on_log(args, state, control, model=model, logs=dict(finite))
        if self._picture_every and state.global_step % self._picture_every == 0:
            self._show(args, state)

    def _show(self, args, state) -> None:
        viewers = [
            c for c in self._integrations if isinstance(c, (TensorBoardCallback, TrackioCallback, WandbCallback))
        ]
        steps = history.recorded_steps(args.output_dir)
        if not viewers or len(steps) < 2:
            return
        from matplotlib.image import imread

        from ..plotting import Snapshot, plot_history

        with tempfile.TemporaryDirectory(prefix="hf_ortho.") as folder:
            path = str(Path(folder) / "shapes.png")
            plot_history([Snapshot(history.read_step(file)[0], step) for step, file in (steps[0], steps[-1])], path)
            for viewer in viewers:
                _send_picture(viewer, path, imread(path), state.global_step)


def _entries(name: str, values: Tensor) -> dict[str, float]:
    """The entries of a parameter as scalars; with groups, their extremes and median over the groups."""
    if values.ndim == 1:
        return {f"{name}.{i}": value for i, value in enumerate(values.tolist())}
    over = {"minimum": values.amin(0), "median": values.median(0).values, "maximum": values.amax(0)}
    return {f"{name}.{i}.{key}": value for key, row in over.items() for i, value in enumerate(row.tolist())}


def _send_picture(viewer: TrainerCallback, path: str, pixels, step: int) -> None:
    tag = "activations/shapes"
    if isinstance(viewer, TensorBoardCallback):
        viewer.tb_writer.add_image(tag, pixels, step, dataformats="HWC")
    else:
        if isinstance(viewer, WandbCallback):
            import wandb as tracker
        else:
            import trackio as tracker
        tracker.log({tag: tracker.Image(path), "train/global_step": step})


class _Moments:
    """Moments of the inputs of one activation, accumulated until ``close``."""

    def __init__(self, module: LearnableActivation):
        self.sums: list[Tensor] = []
        self.extremes: Tensor | None = None
        self.device = module.domain.device
        self._handle = module.register_forward_pre_hook(self._update)

    @torch.no_grad()
    def _update(self, module: LearnableActivation, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float()
        split, (lo, hi), _ = broadcasting(x, module.domain, module.tail_slopes)
        outside = ((split < lo) | (split > hi)).sum()
        count = torch.tensor(float(x.numel()), device=x.device)
        self.sums.append(torch.stack([count, x.sum(), x.square().sum(), outside.float()]))
        low, high = x.aminmax()
        extremes = torch.stack([-low, high])
        self.extremes = extremes if self.extremes is None else torch.maximum(self.extremes, extremes)

    def close(self) -> dict[str, float]:
        self._handle.remove()
        sums = torch.zeros(4, dtype=torch.float64)
        for each in self.sums:
            sums += each.cpu()
        extremes = torch.full((2,), -math.inf, device=self.device) if self.extremes is None else self.extremes
        extremes = max_over_processes(extremes)
        count, total, squares, outside = sum_over_processes(sums.to(collective_device(sums.device))).tolist()
        if not count:
            return {}
        mean = total / count
        return {
            "minimum": -float(extremes[0]),
            "maximum": float(extremes[1]),
            "mean": mean,
            "std": math.sqrt(max(squares / count - mean**2, 0.0)),
            "outside": outside / count,
        }


def _handler() -> CallbackHandler:
    """The calling ``CallbackHandler``: Trainer does not pass its integrations to callbacks."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(handler := frame.f_locals.get("self"), CallbackHandler):
            return handler
        frame = frame.f_back
    raise ConfigError("ActivationLogger: only works as a callback of transformers.Trainer")
