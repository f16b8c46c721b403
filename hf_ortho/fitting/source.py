"""The function to fit, with its derivative, asymptotes and kinks found numerically."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers.activations import ACT2FN

from ..errors import FitError

Array = np.ndarray

# A function counts as having reached its asymptotes here, if the slope at twice the distance is the same.
FAR = 1.0e4
# A straight stretch from 8 to 9.5 counts as the tail even if g bends later: gelu_10 is min(gelu(x), 10).
NEAR = 8.0, 9.5


@dataclasses.dataclass(frozen=True)
class Source:
    """An element-wise function g with its derivative, asymptotic lines and kinks, evaluated in float64.

    ``slopes`` and ``intercepts`` describe the asymptotes at (-inf, +inf): g(x) - slope * x - intercept -> 0, up to
    ``reach``, beyond which g is another line. ``kinks`` are the points where g' jumps. ``piecewise_linear`` is True if
    g is linear between them.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    slopes: tuple[float, float]
    intercepts: tuple[float, float]
    kinks: tuple[float, ...]
    piecewise_linear: bool
    reach: tuple[float, float] = (-math.inf, math.inf)

    @classmethod
    def of(cls, fn: str | Callable[[torch.Tensor], torch.Tensor], name: str | None = None) -> Source:
        """Analyze ``fn``: a name in ACT2FN, a torch callable, or a module (copied, with float64 parameters).

        Raises:
            FitError: ``fn`` is unknown, not element-wise, not finite, or has no straight asymptotes.
        """
        if isinstance(fn, str):
            if fn not in ACT2FN:
                raise FitError(f"unknown source activation {fn!r}; known: {', '.join(list(ACT2FN)[:24])} ...")
            name = name or fn
        function: Callable = ACT2FN[fn] if isinstance(fn, str) else fn
        name = name or getattr(function, "__name__", None) or type(function).__name__
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).cpu().double().requires_grad_(False)
        draft = cls(name, function, (0.0, 0.0), (0.0, 0.0), (), False)
        probe = np.linspace(-12.0, 12.0, 4801)
        try:
            g, dg = draft.value(probe), draft.derivative(probe)
            part = draft.value(probe[::7])
        except (TypeError, RuntimeError, ValueError) as error:
            raise FitError(f"{name} cannot be evaluated on a float64 vector: {error}") from error
        if not (np.isfinite(g).all() and np.isfinite(dg).all()):
            raise FitError(f"{name} is not finite on [-12, 12]")
        if g.shape != probe.shape or not np.allclose(part, g[::7], rtol=1e-12, atol=1e-12):
            raise FitError(f"{name} is not an element-wise function, so no activation of one variable can match it")
        slopes, intercepts, reach = draft._asymptotes()
        kinks = tuple(k for k in draft._kinks(probe, dg) if reach[0] < k < reach[1])
        bent = [i for i in np.flatnonzero(np.abs(np.diff(dg)) > 1e-9) if reach[0] < probe[i] < reach[1] - 0.01]
        linear = all(any(probe[i] - 1e-6 <= k <= probe[i + 1] + 1e-6 for k in kinks) for i in bent)
        return cls(name, function, slopes, intercepts, kinks, linear, reach)

    def value(self, x: Array) -> Array:
        with torch.no_grad():
            return self.function(torch.as_tensor(x, dtype=torch.float64)).numpy()

    def derivative(self, x: Array) -> Array:
        t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.function(t).sum(), t, materialize_grads=True)
        return g.numpy()

    def _asymptotes(self):
        # On each side, the asymptote is the line with the slope at FAR, provided that the slope at 2 FAR is the same.
        # But g may bend again far beyond the data: if g is straight over NEAR with another slope, the tail is the line
        # through NEAR instead, and bisection finds its reach, where g leaves that line.
        x = np.array([-FAR, -2 * FAR, FAR, 2 * FAR])
        g, dg = self.value(x), self.derivative(x)
        for side, i in (("-inf", 0), ("+inf", 2)):
            if not np.isfinite(g[i : i + 2]).all() or abs(dg[i] - dg[i + 1]) > 1e-6 * max(1.0, abs(dg[i])):
                raise FitError(
                    f"{self.name} has no asymptotic slope at {side} (slope {dg[i]:.4g} at {x[i]:g}, {dg[i + 1]:.4g} at "
                    f"{x[i + 1]:g}); activations with straight tails cannot follow it"
                )
        slopes, intercepts, reach = [], [], []
        for sign, i in ((-1.0, 0), (1.0, 2)):
            slope, intercept, end = float(dg[i + 1]), float(g[i] - dg[i + 1] * x[i]), sign * math.inf
            near = sign * np.array(NEAR)
            gn, dn = self.value(near), self.derivative(near)
            if abs(dn[1] - slope) > 0.1 and abs(dn[1] - dn[0]) < 1e-6:
                slope = float(dn[1])
                intercept = float(gn[1] - slope * near[1])
                inside, outside = near[1], sign * FAR
                while abs(outside - inside) > 1e-9 * abs(inside):
                    middle = (inside + outside) / 2
                    straight = abs(float(self.value(np.array([middle]))[0]) - slope * middle - intercept) < 1e-6
                    inside, outside = (middle, outside) if straight else (inside, middle)
                end = float(np.round(inside, 6))
            slopes.append(slope + 0.0)  # not -0.0
            intercepts.append(intercept)
            reach.append(end)
        return tuple(slopes), tuple(intercepts), tuple(reach)

    def _kinks(self, grid: Array, dg: Array) -> tuple[float, ...]:
        """Bisect every grid cell in which g' changes by more than it could for a smooth g."""
        span = np.ptp(dg)
        kinks = []
        for i in np.flatnonzero(np.abs(np.diff(dg)) > 0.025 * max(span, 1e-12)):
            a, b, da, db = grid[i], grid[i + 1], dg[i], dg[i + 1]
            while b - a > 1e-12:
                middle = (a + b) / 2
                dm = self.derivative(np.array([middle]))[0]
                a, b, da, db = (middle, b, dm, db) if abs(dm - da) <= abs(dm - db) else (a, middle, da, dm)
            if abs(da - db) > 1e-3 * span:
                # A module stores float32; adding 0.0 turns -0.0 into 0.0.
                kinks.append(float(np.float32(round(a, 9))) + 0.0)
        return tuple(sorted(set(kinks)))
