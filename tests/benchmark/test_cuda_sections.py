"""The sections of a GPU, on tensors of the CPU: every branch for CUDA runs, with a stand-in for ``torch.cuda``."""

import dataclasses
import functools
import time
import types

import pytest
import torch
from torch import nn

from hf_ortho.benchmark import QUICK, SECTIONS, gpt2_case, model_cases
from hf_ortho.cli.bench import measure

pytestmark = pytest.mark.usefixtures("unfused_attention")
MEBI = 2**20


class Stand(str):
    """The device ``cpu`` for torch, and ``cuda`` for a comparison."""

    def __eq__(self, other):
        return other == "cuda"

    def __ne__(self, other):
        return other != "cuda"

    __hash__ = str.__hash__


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def query(self):
        return False

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


@pytest.fixture
def cuda(monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=MEBI)
    functions = {
        "Event": Event,
        "_sleep": lambda cycles: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda: (2**34, 2**35),
        "memory_allocated": lambda: MEBI,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 3 * MEBI,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for module in (model_cases, gpt2_case):
        monkeypatch.setattr(module, "mixed_precision", lambda settings: torch.autocast("cpu", settings.dtype))
    return dataclasses.replace(QUICK.on("cuda"), device=Stand("cpu"), rounds=2, sample=1e-4, compiled=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's compiler
def test_all_sections(cuda, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    saved: list[int] = []
    results = measure(SECTIONS["cuda"], cuda, lambda results: saved.append(len(results.figures)))
    assert [entry for entry in results.not_run if entry.failed] == []
    absent = {entry.case for entry in results.not_run} & {"vllm"}  # not in this environment
    assert {figure.case for figure in results.figures} == set(SECTIONS["cuda"]) - absent
    assert set(results.seconds) == set(SECTIONS["cuda"])
    assert tuple(results.of("gpt2_compiled")) == gpt2_case.ACTIVATIONS
    peak = results.find("gpt2_eager", "hermite_3", "peak")
    assert peak.value == 2 * MEBI
    assert saved == sorted(saved)
    assert len(saved) == len(SECTIONS["cuda"])
