"""Benchmarks of full models: training steps of GPT-2 and ConvNeXt, before and after conversion."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from .. import fuse_mlp
from ..conversion import convert
from ..profiling.memory import kept_bytes, measure_each, peak_bytes
from ..profiling.timing import interleave
from .results import BenchResults
from .settings import Settings


def converted(model: PreTrainedModel, activation: str) -> PreTrainedModel:
    model = copy.deepcopy(model)
    convert(model, activation)
    return model


def _fused(model: PreTrainedModel, activation: str) -> PreTrainedModel:
    model = converted(model, activation)
    fuse_mlp(model)
    return model


def mixed_precision(settings: Settings) -> torch.autocast:
    """Autocast to ``settings.dtype``, unless it is float32."""
    return torch.autocast(settings.device, settings.dtype, enabled=settings.dtype != torch.float32)


def new_gpt2(settings: Settings) -> PreTrainedModel:
    """A GPT-2 without dropout, whose masks add time and memory to all variants."""
    torch.manual_seed(settings.seed)
    others = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(settings.gpt2 | others)))


def gpt2_batch(settings: Settings) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(settings.gpt2["vocab_size"], settings.gpt2_batch, generator=generator).to(settings.device)
    return {"input_ids": ids, "labels": ids}


def _train_step(
    results: BenchResults, settings: Settings, case: str, models: dict[str, PreTrainedModel], batch
) -> None:
    """Forward and backward pass. Gradients are freed after each step. The optimizer, equal for all, is omitted."""
    for model in models.values():
        torch.nn.Module.to(model, settings.device).train()

    def loss(model: PreTrainedModel) -> torch.Tensor:
        with mixed_precision(settings):
            return model(**batch).loss

    def step(model: PreTrainedModel) -> None:
        loss(model).backward()
        model.zero_grad(set_to_none=True)

    calls = {name: functools.partial(step, model) for name, model in models.items()}
    times = interleave(calls, rounds=settings.rounds, device=settings.device)
    results.add_times(case, "step", times)
    forwards = {name: functools.partial(loss, model) for name, model in models.items()}
    results.add_memory(case, "kept", measure_each(kept_bytes, forwards, settings.device))
    results.add_memory(case, "peak", measure_each(peak_bytes, calls, settings.device))


def gpt2(results: BenchResults, settings: Settings) -> None:
    original = new_gpt2(settings)
    models = {
        "gelu_new": original,
        "hermite_3": converted(original, "hermite_3"),
        "hermite_8": converted(original, "hermite_8"),
        "hermite_8 + fuse_mlp": _fused(original, "hermite_8"),
    }
    _train_step(results, settings, "gpt2", models, gpt2_batch(settings))


def convnext(results: BenchResults, settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    original = ConvNextForImageClassification(ConvNextConfig(**(settings.convnext | {"num_labels": 10})))
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.convnext_batch, 3, settings.convnext["image_size"], settings.convnext["image_size"])
    batch = {
        "pixel_values": torch.randn(size, generator=generator).to(settings.device),
        "labels": torch.randint(10, size[:1], generator=generator).to(settings.device),
    }
    models = {
        "gelu": original,
        "hermite_8": converted(original, "hermite_8"),
        "hermite_8 + fuse_mlp": _fused(original, "hermite_8"),
    }
    _train_step(results, settings, "convnext", models, batch)
