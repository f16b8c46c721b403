"""Train only the activations of a converted model toward the outputs of its source model."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..activations import LearnableActivation
from ..checkpoints.verify import evaluating
from ..errors import CalibrationError
from ..fitting.density import DATA_FREE
from ..processes import mean_over_processes, min_over_processes
from .fisher import inputs_only
from .inputs import predict, readable_again
from .replace import swapped

RATE = 0.02  # learning rate, in units of the root mean square error of the fit


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Result of a distillation: the relative squared error of the outputs on a held-out (or the only) batch.

    ``steps`` is 0 if there was nothing to gain: the error was 0 or not finite.
    """

    steps: int
    error_before: float
    error_after: float
    held_out: bool

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Distillation:
        """The inverse of ``dataclasses.asdict`` as JSON; an error that is not finite is None there."""
        before, after = (
            math.inf if plain[key] is None else float(plain[key]) for key in ("error_before", "error_after")
        )
        return cls(int(plain["steps"]), before, after, bool(plain["held_out"]))


def check_steps(steps: int, batches: Iterable | None) -> None:
    """Raise CalibrationError unless ``steps`` of distillation over ``batches`` are possible."""
    if steps < 0:
        raise CalibrationError(f"distill {steps!r}: must be a number of steps, at least 0")
    if steps and batches is None:
        raise CalibrationError("distill needs calibration batches: it matches the outputs of the source model on them")
    if steps and batches is not None and not readable_again(batches):
        raise CalibrationError("distill reads the calibration batches many times: pass a list of them")


def distill(model: PreTrainedModel, sources: dict[str, nn.Module], batches: Iterable, steps: int) -> Distillation:
    """Train the parameters and domains of the activations at the paths of ``sources`` by ``steps`` of Adam.

    The loss is |y - z|^2 / |z|^2 for the logits (or first output) y of the converted and z of the source model. Each
    parameter is scaled: one unit changes the activation by as much as the error of the fit. If the held-out error does
    not decrease, the initial values are restored.

    Args:
        sources: the activations that were replaced, by path.
        batches: model inputs. At most ``steps`` + 1 batches are read; the last is held out if there are several.
    """
    seen = list(itertools.islice(batches, steps + 1))
    seen = seen[: int(min_over_processes(torch.tensor(len(seen), device=model.device)))]
    if not seen:
        raise CalibrationError("distill needs calibration batches in every process")
    several = len(seen) > 1
    held_out = seen.pop() if several else seen[0]
    pairs = [(cast(LearnableActivation, model.get_submodule(path)), source) for path, source in sources.items()]
    pairs = list({id(module.domain): (module, source) for module, source in pairs}.values())  # tied modules once
    learned = [module for module, _ in pairs]
    before = {id(module): {k: v.clone() for k, v in module.state_dict().items()} for module in learned}

    def error(batch) -> Tensor:
        with torch.no_grad(), swapped(model, sources):
            target = predict(model, batch).rows().float()
        return torch.sum((predict(model, batch).rows().float() - target) ** 2) / torch.sum(target**2)

    with evaluating(model), _only(model, learned) as parameters:
        with torch.no_grad():
            error_before = float(mean_over_processes(error(held_out)))
        if not 0 < error_before < math.inf:
            return Distillation(0, 0.0, 0.0, several)
        scales = [scale for module, source in pairs for scale in _scales(module, source)]
        starts = [p.detach().clone() for p in parameters]
        offsets = [torch.zeros_like(p, requires_grad=True) for p in parameters]
        optimizer = torch.optim.Adam(offsets, lr=RATE)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for step in range(steps):
            gradients = torch.autograd.grad(error(seen[step % len(seen)]), parameters, materialize_grads=True)
            for offset, gradient, scale in zip(offsets, gradients, scales, strict=True):
                offset.grad = mean_over_processes(gradient) * scale
            optimizer.step()
            decay.step()
            with torch.no_grad():
                for p, start, scale, offset in zip(parameters, starts, scales, offsets, strict=True):
                    p.copy_(start + scale * offset)
        with torch.no_grad():
            error_after = float(mean_over_processes(error(held_out)))
    if not error_after < error_before:
        for module in learned:
            module.load_state_dict(before[id(module)])
    return Distillation(steps, error_before, min(error_before, error_after), several)


@contextlib.contextmanager
def _only(model: PreTrainedModel, modules: list) -> Iterator[list[nn.Parameter]]:
    """The ``_distilled`` parameters of ``modules``; only they require gradients inside the block."""
    with inputs_only(model):
        chosen = [p for module in modules for p in _distilled(module).values()]
        for p in chosen:
            p.requires_grad_()
        yield chosen


def _distilled(module: LearnableActivation) -> dict[str, nn.Parameter]:
    """The parameters of the series, and the domain if it is finite."""
    return {n: p for n, p in module.named_parameters() if n != "tail_slopes" and torch.isfinite(p).all()}


@torch.no_grad()
def _scales(module: LearnableActivation, source: nn.Module) -> list[Tensor]:
    """The step of each ``_distilled`` parameter that changes f by its error against the source, under ``DATA_FREE``."""
    x = DATA_FREE.mean + DATA_FREE.deviation * torch.special.ndtri((torch.arange(256.0) + 0.5) / 256)
    x = x.to(module.domain.device).unsqueeze(1).expand(-1, module.groups)
    state = _distilled(module)
    total = torch.func.grad(lambda values, row: torch.func.functional_call(module, values, (row,)).sum())
    slopes = torch.func.vmap(total, in_dims=(None, 0))(state, x)  # of the sum over groups: each has its own parameters
    miss = (module(x) - source(x)).square().mean(0).sqrt()
    miss = miss.unsqueeze(1) if module.groups > 1 else miss
    return [miss / slope.square().mean(0).sqrt().clamp(min=1e-3) for slope in slopes.values()]
