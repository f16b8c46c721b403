"""The benchmarked activations. ``F.gelu`` is the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..activations import FAMILIES, build

REFERENCE = "F.gelu"


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x


class Copy(nn.Module):
    """No arithmetic: reads x and writes y, then reads x and the gradient and writes a gradient. A lower bound."""

    def forward(self, x: Tensor) -> Tensor:
        return _Copy.apply(x)


class Cosine(nn.Module):
    """One cosine: a Fourier activation computes one per degree, and as many sines in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x)


def _from_scratch(name: str) -> nn.Module:
    """With ``init="unit"``, where every line of a tropical activation is the maximum somewhere."""
    return build(name, init="unit")


def _with_tails(name: str) -> nn.Module:
    module = build(name)
    module.fit("gelu")
    return module


def _compiled(name: str) -> nn.Module:
    module = _from_scratch(name)
    module.compile(fullgraph=True)  # raise an error instead of silently falling back to eager
    return module


def _torchortho(name: str) -> nn.Module:
    import torchortho

    cls, degree = {
        "hermite_3": (torchortho.HermiteActivation, 3),
        "fourier_6": (torchortho.FourierActivation, 6),
        "tropical_6": (torchortho.TropicalActivation, 6),
        "tropical_rational_6": (torchortho.TropicalRationalActivation, 6),
    }[name]
    return cls(degree)


def _rational(device: str) -> nn.Module:
    from rational.torch import Rational

    return Rational(cuda=device == "cuda")


def fixed() -> dict[str, Callable[[], nn.Module]]:
    return {
        REFERENCE: nn.GELU,
        "copy": Copy,
        "gelu_new": functools.partial(ACT2FN.__getitem__, "gelu_new"),
        "silu": nn.SiLU,
        "torch.cos": Cosine,
    }


def learnable() -> dict[str, Callable[[], nn.Module]]:
    """Every family at its default degree, and the other activations with targets."""
    names = ["hermite_3", *(f"{family}_{cls.default_degree}" for family, cls in FAMILIES.items())]
    makers: dict[str, Callable[[], nn.Module]] = {name: functools.partial(_from_scratch, name) for name in names}
    for name in ("hermite_3", "hermite_8", "fourier_6"):
        makers[f"{name} with tails"] = functools.partial(_with_tails, name)
    return makers


def compiled() -> dict[str, Callable[[], nn.Module]]:
    return {f"{name} compiled": functools.partial(_compiled, name) for name in ("hermite_3", "hermite_8", "fourier_6")}


def third_party(device: str) -> dict[str, Callable[[], nn.Module]]:
    """Other libraries, measured if installed."""
    names = ("hermite_3", "fourier_6", "tropical_6", "tropical_rational_6")
    makers: dict[str, Callable[[], nn.Module]] = {
        f"torchortho {name}": functools.partial(_torchortho, name) for name in names
    }
    makers["rational-activations"] = functools.partial(_rational, device)
    return makers
