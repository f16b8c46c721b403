"""Time and memory of an optimizer step with each activation of a comparison."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from ..logs import logging_at
from ..profiling.memory import kept_bytes, measure_each
from ..profiling.timing import Times, interleave
from .arguments import Comparison, Recipe
from .assemble import assemble, build_trainer
from .compare import member


def measure_steps(comparison: Comparison, rounds: int) -> tuple[dict[str, Times], dict[str, float]]:
    """Time an optimizer step on one micro-batch with each activation, and count the bytes saved by its forward pass.

    The steps are interleaved in one process, so other load on the machine slows all of them alike. The first
    activation is the reference of the ratios.
    """
    arguments, steps, forwards = comparison.training, {}, {}
    for name in comparison.compare.activations:
        recipe = member(comparison, name, comparison.compare.seeds[0], Path(str(arguments.output_dir)))
        with logging_at(logging.ERROR, "hf_ortho"):  # the runs have logged the announcements and notes
            steps[name], forwards[name] = _step(recipe)
    device = arguments.device.type
    return interleave(steps, rounds=rounds, device=device), measure_each(kept_bytes, forwards, device)


def _step(recipe: Recipe) -> tuple[Callable[[], None], Callable[[], object]]:
    """An optimizer step on one micro-batch, and its forward pass."""
    checkpoint, train, _, _ = assemble(recipe)
    trainer, _ = build_trainer(recipe, checkpoint, train, None)
    batch = next(iter(trainer.get_train_dataloader()))
    model, optimizer = trainer.accelerator.prepare(cast(nn.Module, trainer.model).train(), trainer.create_optimizer())
    trainer.current_gradient_accumulation_steps = 1
    limit = trainer.args.max_grad_norm

    def step() -> None:
        trainer.training_step(model, dict(batch))
        if limit:
            trainer.accelerator.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> object:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))

    return step, forward
