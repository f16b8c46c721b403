"""Training steps of GPT-2 with an optimizer, eager or with compiled blocks."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..conversion import convert
from ..files import explain
from ..profiling.memory import kept_bytes, measure_each, peak_bytes
from ..profiling.timing import interleave
from .model_cases import gpt2_batch, mixed_precision, new_gpt2
from .results import BenchResults, NotRun
from .settings import Settings

FIXED = ("gelu", "gelu_new")
ACTIVATIONS = (*FIXED, "hermite_3", "hermite_8", "fourier_6", "tropical_6")
SAMPLE = 0.2  # seconds of steps in one measurement


class Step:
    """A copy of a GPT-2 with another activation, in mixed precision with AdamW."""

    def __init__(self, original: PreTrainedModel, activation: str, settings: Settings, *, compile_blocks: bool):
        self.settings = settings
        model: Any = copy.deepcopy(original)
        if activation in FIXED:
            for block in model.transformer.h:
                block.mlp.act = ACT2FN[activation]
        else:
            convert(model, activation)
        model.config.use_cache = False
        self.model = torch.nn.Module.to(model, settings.device).train()
        if compile_blocks:
            for block in self.model.transformer.h:
                block.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batch = gpt2_batch(settings)

    def loss(self) -> torch.Tensor:
        with mixed_precision(self.settings):
            return self.model(**self.batch).loss

    def __call__(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def eager(results: BenchResults, settings: Settings) -> None:
    _all(results, settings, "gpt2_eager", compile_blocks=False)


def compiled(results: BenchResults, settings: Settings) -> None:
    with torch._dynamo.config.patch(recompile_limit=2 * len(ACTIVATIONS)):  # variants of the forward of a block
        _all(results, settings, "gpt2_compiled", compile_blocks=True)


def _all(results: BenchResults, settings: Settings, case: str, *, compile_blocks: bool) -> None:
    """Interleave the steps of all activations. The first is the reference, so its failure ends the section."""
    original = new_gpt2(settings)
    steps: dict[str, Step] = {}
    for name in ACTIVATIONS:
        if time.monotonic() > settings.deadline:
            results.not_run.append(NotRun(case, name, "left out to stay within the budget"))
            continue
        try:
            steps[name] = Step(original, name, settings, compile_blocks=compile_blocks)
            steps[name]()  # compiles, and creates the state of the optimizer
        except Exception as error:  # any failure: continue with the rest
            if name == ACTIVATIONS[0]:
                raise
            steps.pop(name, None)
            results.not_run.append(NotRun(case, name, explain(error), failed=True))
    if not steps:
        return
    times = interleave(steps, rounds=settings.rounds, sample=SAMPLE, device=settings.device)
    results.add_times(case, "step", times)
    results.add_speeds(case, math.prod(settings.gpt2_batch), times)
    forwards = {name: step.loss for name, step in steps.items()}
    results.add_memory(case, "kept", measure_each(kept_bytes, forwards, settings.device))
    results.add_memory(case, "peak", measure_each(peak_bytes, steps, settings.device))
