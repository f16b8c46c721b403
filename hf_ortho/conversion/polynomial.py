"""Export polynomial activations as polynomials: each activation of a model, or a whole small network."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import cast

import numpy as np
from sympy import QQ, Poly, Rational, symbols
from torch import nn

from ..activations import LearnableActivation, PolynomialForm
from ..activations.polynomial import PolynomialActivation
from ..checkpoints.provenance import Provenance
from ..errors import PolynomialError


def polynomials(model: nn.Module) -> dict[str, PolynomialForm | list[PolynomialForm]]:
    """The polynomial of every activation of ``model``, by module path; with groups, a list of one per group.

    If the domain of a module is infinite, the interval is the ``domain`` of its entry in
    ``model.config.hf_ortho["layers"]``. Outside its domain an activation is a straight line. Other parts of a model,
    such as softmax and normalization, are not polynomials.

    Raises:
        PolynomialError: there are no learnable activations, or one is not a polynomial or has no finite domain.

    Example:
        >>> report = hf_ortho.convert(model, "hermite_4")
        >>> forms = hf_ortho.polynomials(model)
        >>> forms["transformer.h.0.mlp.act"].degree
        4
    """
    provenance = Provenance.of(getattr(model, "config", None))
    forms: dict[str, PolynomialForm | list[PolynomialForm]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LearnableActivation):
            continue
        if not isinstance(module, PolynomialActivation):
            raise PolynomialError(f"{path} is {module.name}, which is not a polynomial: convert to hermite_n")
        domain = None if module.domain.isfinite().all() else provenance.layer(path).domain
        try:
            found = [cast(PolynomialActivation, member).to_polynomial(domain) for member in module.members()]
            forms[path] = found if module.groups > 1 else found[0]
        except PolynomialError as error:
            raise PolynomialError(f"{path}: {error}") from None
    if not forms:
        raise PolynomialError(
            f"{type(model).__name__} has no learnable activations: convert it first, "
            "hf_ortho.convert(model, 'hermite_8')"
        )
    return forms


def expand(network: nn.Module, *, max_terms: int = 5_000, ignore_tails: bool = False) -> list[Poly]:
    """The exact multivariate polynomial of a stack of affine maps and polynomial activations.

    With L layers of activations of degree n, its total degree in the inputs is n^L.

    Args:
        network: an ``nn.Sequential`` (may be nested) of ``nn.Linear`` and polynomial activations such as ``Hermite``.
        max_terms: the largest number of monomials of an output. Thousands of terms take seconds to minutes, and time
            grows faster than their number.
        ignore_tails: treat activations with a finite domain as their polynomials. The expansion then equals the
            network only if every pre-activation lies in its domain. By default such a module raises an error.

    Returns:
        One ``sympy.Poly`` with rational coefficients for each output, in the generators x0, x1, ... (the inputs).
        It is exact for the stored values of the parameters, without rounding.

    Raises:
        PolynomialError: the stack contains another module, widths do not match each other or the groups of an
            activation, a parameter is not finite, an activation has tails, or there are C(n_in + degree, degree) >
            ``max_terms`` monomials.

    Example:
        >>> square = hf_ortho.activations.Hermite(2)
        >>> _ = square.coefficients.data.copy_(torch.tensor([1.0, 0.0, 2.0]))  # He_0 + 2 He_2/2! = x^2
        >>> linear = torch.nn.Linear(2, 1, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, 0.5]]))
        >>> hf_ortho.expand(torch.nn.Sequential(linear, square))[0].as_expr()
        x0**2 + x0*x1 + x1**2/4
    """
    layers = _layers(network, ignore_tails)
    n_in = next((layer.in_features for layer in layers if isinstance(layer, nn.Linear)), None)
    if n_in is None:
        raise PolynomialError(f"{type(network).__name__} has no nn.Linear: the number of inputs is unknown")
    degree = math.prod(max(len(layer[0]) - 1, 1) for layer in layers if not isinstance(layer, nn.Linear))
    terms = math.comb(n_in + degree, degree)
    if terms > max_terms:
        raise PolynomialError(
            f"the expansion has up to C({n_in} + {degree}, {degree}) = {Decimal(terms):.10g} monomials ({n_in} inputs, "
            f"degree {degree}), more than max_terms={max_terms}: take fewer inputs, fewer layers or a lower degree, or "
            "raise max_terms"
        )
    inputs = symbols(f"x:{n_in}")
    values = [Poly(x, *inputs, domain=QQ) for x in inputs]
    for layer in layers:
        values = _affine(layer, values) if isinstance(layer, nn.Linear) else _activated(layer, values)
    return values


def _layers(network: nn.Module, ignore_tails: bool) -> list[nn.Linear | list[np.ndarray]]:
    """The layers in order, checked; activations as the exact monomial coefficients of each group of channels."""
    layers: list[nn.Linear | list[np.ndarray]] = []
    width = None
    for path, module in network.named_modules(remove_duplicate=False):
        where = f"module {path}" if path else "the network"
        if type(module) is nn.Linear:  # a subclass of nn.Linear or nn.Sequential may compute something else
            if width not in (None, module.in_features):
                raise PolynomialError(
                    f"{where} takes {module.in_features} values, but the previous nn.Linear outputs {width}"
                )
            for name, parameter in module.named_parameters():
                if not parameter.isfinite().all():
                    raise PolynomialError(
                        f"{name} of {where} contains NaN or infinity: a polynomial needs finite weights"
                    )
            width = module.out_features
            layers.append(module)
        elif isinstance(module, PolynomialActivation):
            if not (ignore_tails or module.domain.isinf().all()):
                lo, hi = module.members()[0].domain.tolist()
                raise PolynomialError(
                    f"{where} is a straight line outside its domain [{lo:g}, {hi:g}], so it is not a polynomial: pass "
                    "ignore_tails=True if every pre-activation stays inside"
                )
            layers.append([cast(PolynomialActivation, member).exact_monomials() for member in module.members()])
        elif type(module) is not nn.Sequential:
            raise PolynomialError(
                f"{where} is {type(module).__name__}: expected an nn.Sequential of nn.Linear and polynomial activations"
            )
    return layers


def _affine(layer: nn.Linear, values: list[Poly]) -> list[Poly]:
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    out = []
    for row, b in zip(layer.weight.tolist(), bias, strict=True):
        total = Poly(Rational(b), *values[0].gens, domain=QQ)
        for w, value in zip(row, values, strict=True):
            total += value * Rational(w)
        out.append(total)
    return out


def _activated(members: list[np.ndarray], values: list[Poly]) -> list[Poly]:
    if len(values) % len(members):
        raise PolynomialError(
            f"an activation with {len(members)} groups of channels gets {len(values)} values: the width must be a "
            f"multiple of {len(members)}"
        )
    return [_horner(members[i * len(members) // len(values)], value) for i, value in enumerate(values)]


def _horner(coefficients: np.ndarray, value: Poly) -> Poly:
    *rest, total = (Poly(Rational(a), *value.gens, domain=QQ) for a in coefficients)
    for a in reversed(rest):
        total = total * value + a
    return total
