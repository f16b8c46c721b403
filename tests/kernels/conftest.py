import pytest
import torch

from hf_ortho.activations import FAMILIES
from hf_ortho.activations.base import SHARED
from hf_ortho.kernels import cpu

NAMES = [f"{family}_{degree}" for family, cls in FAMILIES.items() if cls.cpu_series for degree in (1, 3, 8, 9, 12)]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 elements, so that a few hundred go through all that large tensors do."""
    monkeypatch.setattr(cpu, "GRAIN", 50)
    monkeypatch.setattr(cpu, "LARGE", 51)
    monkeypatch.setattr(cpu, "CHUNK", 64)


@pytest.fixture
def reference():
    """f(x) and all gradients by float64 autograd of the plain formula, by name; ``x`` among them."""

    def differentiate(module, x, g):
        tensors = {"x": x, "domain": module.domain, "tail_slopes": module.tail_slopes, **dict(series(module))}
        exact = {key: t.detach().double().requires_grad_(key != "tail_slopes") for key, t in tensors.items()}
        y = type(module).formula(*exact.values())
        wanted = {key: t for key, t in exact.items() if t.requires_grad}
        return y.detach(), dict(zip(wanted, torch.autograd.grad(y, wanted.values(), g.double()), strict=True))

    return differentiate


@pytest.fixture
def measured():
    """The same of the module itself, in the dtypes that it has."""

    def differentiate(module, x, g):
        module.domain.requires_grad_()
        x = x.detach().requires_grad_()
        y = module(x)
        wanted = {"x": x, "domain": module.domain, **dict(series(module))}
        return y.detach(), dict(zip(wanted, torch.autograd.grad(y, wanted.values(), g), strict=True))

    return differentiate


def series(module):
    return ((key, p) for key, p in module.named_parameters() if key not in SHARED)


@pytest.fixture
def assert_near():
    """``assert_near(found, exact, elements, sums)``: errors relative to the largest element of the exact result."""

    def check(found, exact, elements, sums):
        assert found[1].keys() == exact[1].keys()
        pairs = [("y", found[0], exact[0]), *((key, found[1][key], exact[1][key]) for key in exact[1])]
        for key, ours, theirs in pairs:
            assert ours.shape == theirs.shape
            size = theirs.abs().max().item() if theirs.numel() else 0.0
            error = (ours.double() - theirs).abs().max().item() if theirs.numel() else 0.0
            assert error <= (elements if key in ("y", "x") else sums) * size, f"{key}: {error:.2g} of {size:.2g}"

    return check
