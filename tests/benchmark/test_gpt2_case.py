"""Training steps of GPT-2 in mixed precision, as on a GPU, with a small model on the CPU."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from hf_ortho.benchmark import QUICK, BenchResults, NotRun, gpt2_case
from hf_ortho.benchmark.gpt2_case import ACTIVATIONS, Step
from hf_ortho.benchmark.model_cases import new_gpt2
from hf_ortho.profiling.memory import saved_bytes

pytestmark = pytest.mark.usefixtures("unfused_attention")
SETTINGS = dataclasses.replace(QUICK, dtype=torch.bfloat16, rounds=1)


@pytest.mark.slow
def test_figures():
    results = BenchResults()
    gpt2_case.eager(results, SETTINGS)
    found = results.of("gpt2_eager")
    assert tuple(found) == ACTIVATIONS
    assert results.not_run == []
    for figures in found.values():
        assert figures["step"].ratio == pytest.approx(figures["step"].value / found["gelu"]["step"].value)
        assert figures["speed"].value == pytest.approx(math.prod(QUICK.gpt2_batch) / figures["step"].value)
        assert figures["speed"].ratio == pytest.approx(1 / figures["step"].ratio)


@pytest.mark.slow
def test_one_that_fails_does_not_end_the_others(monkeypatch):
    class Failing(Step):
        def __init__(self, original, activation, *args, **kwargs):
            if activation == "hermite_3":
                raise RuntimeError("out of memory\nmore")
            super().__init__(original, activation, *args, **kwargs)

    monkeypatch.setattr(gpt2_case, "Step", Failing)
    results = BenchResults()
    gpt2_case.eager(results, SETTINGS)
    assert results.not_run == [NotRun("gpt2_eager", "hermite_3", "out of memory", failed=True)]
    assert set(results.of("gpt2_eager")) == {*ACTIVATIONS} - {"hermite_3"}


def test_nothing_starts_after_the_deadline():
    results = BenchResults()
    gpt2_case.compiled(results, dataclasses.replace(SETTINGS, deadline=-math.inf))
    assert results.figures == []
    assert {entry.row for entry in results.not_run} == set(ACTIVATIONS)
    assert not any(entry.failed for entry in results.not_run)


def test_mixed_precision_keeps_weights_in_float32():
    step = Step(new_gpt2(SETTINGS), "hermite_3", SETTINGS, compile_blocks=False)
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}
    with_autocast = saved_bytes(step.loss)
    full = Step(new_gpt2(QUICK), "hermite_3", QUICK, compile_blocks=False)
    assert with_autocast < saved_bytes(full.loss)


def test_a_step_trains():
    step = Step(new_gpt2(SETTINGS), "hermite_3", SETTINGS, compile_blocks=False)
    before = [p.detach().clone() for p in step.model.parameters() if p.requires_grad]
    step()
    after = [p for p in step.model.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)


@pytest.mark.parametrize("name", ["gelu", "gelu_new"])
def test_fixed_activations(name):
    """The loss of a model that was configured with it."""
    step = Step(new_gpt2(QUICK), name, QUICK, compile_blocks=False)
    configured = new_gpt2(dataclasses.replace(QUICK, gpt2=QUICK.gpt2 | {"activation_function": name}))
    assert torch.equal(step.loss(), configured(**step.batch).loss)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's compiler
def test_compiled_blocks_give_the_same_loss(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    for name in ("gelu", "hermite_3"):
        eager, compiled = (Step(new_gpt2(SETTINGS), name, SETTINGS, compile_blocks=c) for c in (False, True))
        # The compiler sees other operations, in bfloat16: a rounding of 2^-8 per activation.
        torch.testing.assert_close(compiled.loss(), eager.loss(), rtol=2**-8, atol=0)
