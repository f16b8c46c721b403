"""Benchmarks of generation before and after conversion, with transformers and with vLLM."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from ..profiling.timing import Call, elapsed, interleave, wall
from .model_cases import converted, new_gpt2
from .results import BenchResults, NotRun
from .settings import Settings

PROMPT = 16


def generation(results: BenchResults, settings: Settings) -> None:
    """Greedy generation of one sequence with a key-value cache."""
    options = {
        "max_new_tokens": settings.tokens,
        "min_new_tokens": settings.tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones(1, PROMPT, dtype=torch.int64, device=settings.device),
    }
    prompt = _prompt(settings).to(settings.device)
    calls: dict[str, Call] = {}
    for name, model in _models(settings).items():
        torch.nn.Module.to(model, settings.device, settings.dtype)
        calls[name] = functools.partial(model.eval().generate, prompt, **options)
    _measure(results, settings, "generation", calls)


def vllm(results: BenchResults, settings: Settings) -> None:
    """The same with vLLM, each model in processes of its own. Wall time."""
    if importlib.util.find_spec("vllm") is None:
        results.not_run.append(NotRun("vllm", "", "vLLM is not installed"))
        return
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, _environment(settings.device)):
        import vllm  # reads the environment

        sampling = vllm.SamplingParams(temperature=0, max_tokens=settings.tokens, ignore_eos=True, detokenize=False)
        prompt = [{"prompt_token_ids": _prompt(settings)[0].tolist()}]
        options: dict[str, Any] = {"dtype": str(settings.dtype).removeprefix("torch."), "seed": settings.seed}
        options |= {"skip_tokenizer_init": True, "disable_log_stats": True, "enable_prefix_caching": False}
        options |= {"use_tqdm_on_load": False, "enforce_eager": not settings.compiled}
        options |= {"gpu_memory_utilization": 0.4}  # on CUDA the two models share the memory
        calls: dict[str, Call] = {}
        for name, model in _models(settings).items():
            model.save_pretrained(Path(folder, name))
            engine = vllm.LLM(model=str(Path(folder, name)), **options)
            calls[name] = functools.partial(engine.generate, prompt, sampling, use_tqdm=False)
        _measure(results, settings, "vllm", calls)


def _models(settings: Settings) -> dict[str, PreTrainedModel]:
    original = new_gpt2(settings)
    return {"gelu_new": original, "hermite_8": converted(original, "hermite_8")}


def _prompt(settings: Settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(settings.gpt2["vocab_size"], (1, PROMPT), generator=generator)


def _measure(results: BenchResults, settings: Settings, case: str, calls: dict[str, Call]) -> None:
    clock = wall if case == "vllm" else elapsed  # its processes are not this one
    times = interleave(calls, rounds=settings.rounds, device=settings.device, clock=clock)
    results.add_times(case, "generate", times)
    results.add_speeds(case, settings.tokens, times)


def _environment(device: str) -> dict[str, str]:
    """On the CPU, one thread for each engine, on any core, and 1 GiB for its cache; no log of its own."""
    variables = {"VLLM_LOGGING_LEVEL": "ERROR"}
    if device == "cpu":
        variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return variables
