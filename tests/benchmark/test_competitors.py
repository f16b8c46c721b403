"""What is measured is what its name says; a competitor that fails is left out with its reason."""

import dataclasses
import functools
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_ortho.activations import build
from hf_ortho.benchmark import FULL, QUICK, BenchResults, NotRun, activation_cases
from hf_ortho.benchmark.activation_cases import Load, decode, elements, libraries
from hf_ortho.benchmark.competitors import Copy, compiled, fixed, learnable, third_party

X = torch.linspace(-6, 6, 241)


def test_copy_moves_what_an_activation_must():
    x = X.clone().requires_grad_()
    y = Copy()(x)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    gradient = torch.linspace(1, 2, 241)
    assert torch.equal(torch.autograd.grad(y, x, gradient)[0], gradient * X)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gelu_new", functools.partial(F.gelu, approximate="tanh")), ("silu", F.silu), ("F.gelu", F.gelu)],
)
def test_fixed(name, expected):
    torch.testing.assert_close(fixed()[name]()(X), expected(X))


@pytest.mark.parametrize("degree", [3, 8])
def test_tails_follow_gelu_and_pure_series_do_not_end(degree):
    tailed = learnable()[f"hermite_{degree} with tails"]()
    with torch.no_grad():
        assert (tailed(X) - F.gelu(X)).abs().max() < 0.09
    pure = learnable()[f"hermite_{degree}"]()
    assert pure.domain.tolist() == [-float("inf"), float("inf")]


@pytest.mark.slow
@pytest.mark.parametrize("name", compiled())
def test_compiled(name, monkeypatch):
    """Traced whole, for any size; what becomes of the graph is torch's own affair."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    torch.compiler.reset()
    module, eager = compiled()[name](), build(name.removesuffix(" compiled"), init="unit")
    for size in (241, 17):
        x, same = (X[:size].clone().requires_grad_() for _ in range(2))
        y, expected = module(x), eager(same)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, same.grad)


@pytest.fixture
def installed(monkeypatch):
    """``installed(forward)``: a ``torchortho`` whose activations compute ``forward``, and no ``rational``."""

    def installed(forward):
        class Stand(nn.Module):
            def __init__(self, degree):
                super().__init__()
                self.degree = degree

            def forward(self, x):
                return forward(x)

        names = ("HermiteActivation", "FourierActivation", "TropicalActivation", "TropicalRationalActivation")
        monkeypatch.setitem(sys.modules, "torchortho", types.SimpleNamespace(**dict.fromkeys(names, Stand)))
        monkeypatch.setitem(sys.modules, "rational", None)
        monkeypatch.setitem(sys.modules, "rational.torch", None)

    return installed


def test_libraries_run_if_they_are_installed(installed):
    installed(lambda x: x * x.exp())
    results = BenchResults()
    libraries(results, QUICK)
    found = results.of("libraries")
    for name in ("hermite_3", "fourier_6", "tropical_6", "tropical_rational_6"):
        assert found[f"torchortho {name}"]["saved"].ratio == 2
        assert found[f"torchortho {name}"]["forward"].ratio > 0
    assert [entry.row for entry in results.not_run] == ["rational-activations"]
    assert set(found) >= {"F.gelu", "hermite_3", "fourier_6", "tropical_6", "tropical_rational_6"}


def test_a_library_that_fails_is_left_out(installed):
    def fail(x):
        raise RuntimeError("no kernel for this\nmore")

    installed(fail)
    results = BenchResults()
    libraries(results, QUICK)
    reasons = {entry.row: entry.reason for entry in results.not_run}
    assert reasons.pop("rational-activations") != ""
    assert reasons == {name: "no kernel for this" for name in third_party("cpu") if name.startswith("torchortho")}
    assert not [row for row in results.of("libraries") if row.startswith("torchortho")]


def test_sizes_that_do_not_fit_are_left_out(monkeypatch):
    memory = types.SimpleNamespace(available=128 * 10**4)  # x and the upstream gradient of 10**6 elements take more
    monkeypatch.setattr("hf_ortho.benchmark.activation_cases.psutil.virtual_memory", lambda: memory)
    results = BenchResults()
    elements(results, dataclasses.replace(QUICK, elements=(10**4, 10**6)))
    assert list(results.of("elements")) == ["F.gelu 10000", "hermite_8 10000"]
    assert [(entry.row, entry.reason) for entry in results.not_run] == [("hermite_8 1000000", "too little free memory")]


def test_load_is_the_same_every_time():
    one, other = Load((1000,), QUICK), Load((1000,), QUICK)
    assert torch.equal(one.x, other.x)
    assert not torch.equal(one.x, one.gradient)
    assert one.x.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("shape", [(10,), (1000, 1000), (40_000_000,)])
def test_inputs_exceed_the_cache_of_a_gpu(monkeypatch, shape):
    monkeypatch.setattr("hf_ortho.benchmark.activation_cases.l2_bytes", lambda: 50 * 10**3)
    monkeypatch.setattr(Load, "__init__", lambda self, shape, settings, sets=1: setattr(self, "sets", sets))
    size = 2 * math.prod(shape)  # bfloat16
    sets = Load.uncached(shape, FULL.on("cuda")).sets
    assert sets * size >= 4 * 50 * 10**3
    assert (sets - 1) * size < 4 * 50 * 10**3
    assert Load.uncached(shape, FULL).sets == 1


def test_calls_take_turns_over_equal_inputs():
    class Seen(nn.Module):
        def forward(self, x):
            seen.append((x.data_ptr(), x.sum().item()))
            return 2 * x

    seen: list = []
    load = Load((100,), QUICK, sets=3)
    (forward,), (step,) = load.forwards({"a": Seen()}).values(), load.steps({"a": Seen()}).values()
    for call in (forward, step, forward, step, forward, step):
        call()
    assert len({pointer for pointer, _ in seen}) == 3
    assert [pointer for pointer, _ in seen[:3]] == [pointer for pointer, _ in seen[3:]]
    assert {total for _, total in seen} == {load.x.sum().item()}
    assert load.leaf.grad is None


def test_one_that_fails_does_not_end_the_others(monkeypatch):
    def fail():
        raise RuntimeError("out of registers")

    monkeypatch.setattr(activation_cases, "learnable", lambda: {"broken": fail} | learnable())
    results = BenchResults()
    decode(results, QUICK)
    assert results.not_run == [NotRun("decode", "broken", "out of registers", failed=True)]
    assert set(results.of("decode")) == {"F.gelu", "gelu_new", "silu", *learnable()}


def test_without_the_reference_nothing_is_measured(monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(activation_cases, "fixed", lambda: {"F.gelu": fail})
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(BenchResults(), QUICK)
